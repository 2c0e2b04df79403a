"""Placement -> PEFT and TRL on real tiny models: exactly the chosen modules get adapters, and the count agrees."""

from __future__ import annotations

import copy
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import HfArgumentParser
from trl import ModelConfig, get_peft_config

from plop_dist.errors import ExportError, MissingExtraError
from plop_dist.exporters.exporter import find_exporter
from plop_dist.values.placement import Export
from tests.exporters.cases import (
    adapted_paths,
    chosen_paths,
    llama_projections,
    model_of,
    place,
    projection,
    projections_of,
    scores_of,
)

peft_exporter, trl_exporter = find_exporter("peft"), find_exporter("trl")
FAMILIES = ("llama", "gpt2", "gpt_neox", "phi3", "qwen3_moe", "mixtral", "qwen3_next", "gpt_oss")
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def apply(family: str, export: Export, tmp_path: Path) -> PeftModel:
    (tmp_path / "adapter_config.json").write_text(export.files["adapter_config.json"])
    config = PeftConfig.from_pretrained(str(tmp_path))
    config.base_model_name_or_path = None
    return get_peft_model(copy.deepcopy(model_of(family)), config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_every_expressible_type_is_adapted_exactly_and_counted_exactly(family, tmp_path):
    scores = scores_of(projections_of(model_of(family)))
    storage = {module.type: module.storage for module in scores.modules}
    fused = {name for name, kind in storage.items() if kind == "fused"}
    in_pairs = {"experts.gate_proj", "experts.up_proj"} & {
        n for n, kind in storage.items() if kind == "expert_parameter"
    }
    groups = [[name] for name in storage if name not in fused and name not in in_pairs]
    groups += [sorted(fused & set(QKV)), sorted(fused & set(GATE_UP)), sorted(in_pairs), list(storage)]
    for types in filter(None, groups):
        placement = place(scores, types)
        model = apply(family, peft_exporter.export(placement), tmp_path)
        assert adapted_paths(model) == chosen_paths(placement), types
        assert model.get_nb_trainable_parameters()[0] == placement.num_trainable_parameters, types


@pytest.mark.parametrize(
    ("family", "type_", "whole"),
    [
        ("phi3", "v_proj", "qkv_proj"),
        ("phi3", "up_proj", "gate_up_proj"),
        ("gpt2", "q_proj", "c_attn"),
        ("gpt_neox", "k_proj", "query_key_value"),
        ("qwen3_moe", "experts.gate_proj", "gate_up_proj"),
    ],
)
def test_a_part_of_a_fused_weight_is_refused_and_widened_on_demand(family, type_, whole, tmp_path):
    placement = place(scores_of(projections_of(model_of(family))), [type_])
    with pytest.raises(
        ExportError, match=rf"(?s)cannot adapt .*alone.*Nearest choice: adapt {whole} whole \(--widen\)"
    ):
        peft_exporter.export(placement)
    export = peft_exporter.export(placement, widen=True)
    model = apply(family, export, tmp_path)
    assert adapted_paths(model) == chosen_paths(placement)
    assert export.widened
    assert all(whole in sentence for sentence in export.widened)
    assert f"{model.get_nb_trainable_parameters()[0]:,} trainable parameters instead of" in " ".join(export.notes)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen3_next"])
def test_single_layers_and_single_modules(family, tmp_path):
    scores = scores_of(projections_of(model_of(family)))
    in_layer = place(scores, where=lambda item: item.layer == 1)
    assert adapted_paths(apply(family, peft_exporter.export(in_layer), tmp_path)) == chosen_paths(in_layer)
    last = next(module.fqn for module in reversed(scores.modules) if module.type == "q_proj")
    single = place(scores, where=lambda item: item.fqn == last)
    model = apply(family, peft_exporter.export(single), tmp_path)
    assert adapted_paths(model) == {last}
    assert model.get_nb_trainable_parameters()[0] == single.num_trainable_parameters


def test_ranks_of_types_and_modules_with_alpha_over_rank_kept(tmp_path):
    scores = scores_of(projections_of(model_of("llama")))
    ranks = {"v_proj": 2, "model.layers.1.mlp.up_proj": 16}
    placement = place(scores, ["v_proj", "up_proj", "o_proj"], rank_pattern=ranks)
    model = apply("llama", peft_exporter.export(placement), tmp_path)
    found = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert found == {module.fqn: (placement.rank_of(module), 2.0) for module in placement.chosen}
    assert {rank for rank, _ in found.values()} == {2, 4, 16}
    assert model.get_nb_trainable_parameters()[0] == placement.num_trainable_parameters


def test_shared_experts_and_routed_experts_are_told_apart_also_after_saving(tmp_path):
    scores = scores_of(projections_of(model_of("qwen3_next")))
    placement = place(scores, ["down_proj"])
    model = apply("qwen3_next", peft_exporter.export(placement), tmp_path)
    assert adapted_paths(model) == {f"model.layers.{layer}.mlp.shared_expert.down_proj" for layer in (0, 1)}
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(copy.deepcopy(model_of("qwen3_next")), str(tmp_path / "adapter"))
    tokens = model_of("qwen3_next").dummy_inputs["input_ids"] % 100
    assert (again(tokens).logits - model(tokens).logits).abs().max() < 1e-6


def test_to_peft_passes_options_on():
    placement = place(scores_of(llama_projections()), ["v_proj", "o_proj"], rank_pattern={"v_proj": 2})
    config = placement.to_peft(r=16, lora_alpha=32, lora_dropout=0.1, task_type="SEQ_CLS")
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (16, 32, 0.1, "SEQ_CLS")
    assert (config.rank_pattern, config.alpha_pattern) == ({"v_proj": 2}, {"v_proj": 4})
    assert config.target_modules == {"v_proj", "o_proj"}


def test_a_framework_that_is_not_installed_is_one_message(monkeypatch):
    placement = place(scores_of(llama_projections()), ["v_proj"])
    for package, build, extra in (
        ("peft", placement.to_peft, "train"),
        ("deepspeed", placement.to_deepspeed, "deepspeed"),
        ("megatron", placement.to_megatron, "megatron"),
    ):
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delitem(sys.modules, "plop_dist.canonical_lora", raising=False)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingExtraError, match=rf"'{package}', which is not installed: .*\[{extra}\]'"):
            build()


def test_names_never_reach_into_another_tower_or_a_longer_name():
    projections = [*llama_projections(), *llama_projections(stack="vision.blocks"), projection("x.gate_up_proj", 4, 4)]
    placement = place(scores_of(projections), ["v_proj"], where=lambda item: item.fqn.startswith("model."))
    config = json.loads(peft_exporter.export(placement).files["adapter_config.json"])
    assert config["target_modules"] == ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]
    whole = place(scores_of(projections), ["up_proj"])
    assert json.loads(peft_exporter.export(whole).files["adapter_config.json"])["target_modules"] == ["up_proj"]


def test_experts_without_a_token_ride_along_and_are_counted(tmp_path):
    everything = projections_of(model_of("mixtral"))
    silent = [item for item in everything if ".experts.3." in item.fqn]
    scores = scores_of([item for item in everything if item not in silent], left_out=silent)
    placement = place(scores, ["experts.down_proj"])
    export = peft_exporter.export(placement)
    model = apply("mixtral", export, tmp_path)
    assert adapted_paths(model) == chosen_paths(placement)
    assert model.get_nb_trainable_parameters()[0] == placement.num_trainable_parameters
    assert export.notes == ("2 experts.down_proj without a score (no_tokens) are adapted with the rest of their type.",)


def trl_config(export: Export) -> LoraConfig:
    words = [word for flag in export.flags for word in shlex.split(flag)]
    (from_flags,) = HfArgumentParser(ModelConfig).parse_args_into_dataclasses(words)
    config = get_peft_config(from_flags)
    assert config is not None
    return config


def test_trl_refuses_the_head() -> None:
    placement = place(scores_of(projections_of(model_of("llama"))), ["v_proj", "lm_head"])
    with pytest.raises(ExportError, match=r"trl refuses an adapter on the head.*placement\.exclude=\[lm_head\]"):
        trl_exporter.export(placement)
    assert "lm_head" in placement.to_peft().target_modules


@pytest.mark.parametrize(
    ("family", "types"),
    [
        ("llama", ["v_proj"]),
        ("llama", ["v_proj", "o_proj", "down_proj"]),
        ("phi3", ["gate_proj", "up_proj"]),
        ("qwen3_moe", ["o_proj"]),
        ("qwen3_moe", ["experts.down_proj"]),
        ("qwen3_next", ["up_proj", "k_proj"]),
    ],
)
def test_trl_parses_its_flags_and_its_file_into_the_same_modules(family, types, tmp_path):
    placement = place(scores_of(projections_of(model_of(family))), types)
    export = trl_exporter.export(placement)
    config = trl_config(export)
    model = get_peft_model(copy.deepcopy(model_of(family)), config)
    assert adapted_paths(model) == chosen_paths(placement)
    assert model.get_nb_trainable_parameters()[0] == placement.num_trainable_parameters
    (tmp_path / "trl.yaml").write_text(export.files["trl.yaml"])
    (from_file,) = HfArgumentParser(ModelConfig).parse_yaml_file(str(tmp_path / "trl.yaml"))
    assert get_peft_config(from_file).target_modules == trl_config(export).target_modules


def test_trl_writes_one_type_as_a_regex_of_exactly_that_type():
    scores = scores_of([*llama_projections(), projection("model.layers.0.mlp.my_v_proj", 4, 4)])
    config = trl_config(trl_exporter.export(place(scores, ["v_proj"])))
    assert config.target_modules == r".*\.v_proj"
    matched = {module.fqn for module in scores.modules if re.fullmatch(config.target_modules, module.fqn)}
    assert matched == {module.fqn for module in scores.modules if module.type == "v_proj"}


def test_trl_refuses_what_it_would_get_wrong():
    scores = scores_of(llama_projections())
    ranks = place(scores, ["v_proj", "o_proj"], rank_pattern={"v_proj": 16})
    with pytest.raises(ExportError, match=r"one LoRA rank for all modules.*ranks 4, 16.*rank 16 everywhere"):
        trl_exporter.export(ranks)
    widened = trl_exporter.export(ranks, widen=True)
    assert trl_config(widened).r == 16
    assert trl_config(widened).lora_alpha == 32
    assert widened.widened == ("rank 16 everywhere instead of ranks 4, 16.",)
    moe = scores_of(projections_of(model_of("qwen3_moe")))
    with pytest.raises(ExportError, match="would adapt every q_proj of this MoE model"):
        trl_exporter.export(place(moe, where=lambda item: item.fqn == "model.layers.0.self_attn.q_proj"))
    with pytest.raises(ExportError, match="--engine is 'megatron', but trl has: trl"):
        trl_exporter.export(ranks, engine="megatron")
