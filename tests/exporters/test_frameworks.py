"""Placement -> the other frameworks: the documented format, DeepSpeed's real matcher, and what each one must refuse.

The frameworks' own parsers are in test_exporters_real_parsers.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from plop_dist.errors import ExportError
from plop_dist.exporters.exporter import find_exporter
from plop_dist.exporters.suffixes import matcher
from plop_dist.registry import EXPORTERS
from plop_dist.values.placement import Export, Placement
from tests.exporters.cases import llama_projections, model_of, place, projection, projections_of, scores_of

axolotl, llamafactory, ms_swift, openrlhf = map(find_exporter, ("axolotl", "llamafactory", "ms-swift", "openrlhf"))
deepspeed, torchtitan, torchtune, verl = map(find_exporter, ("deepspeed", "torchtitan", "torchtune", "verl"))
megatron_bridge, nemo_rl = map(find_exporter, ("megatron-bridge", "nemo-rl"))

LLAMA = scores_of(llama_projections())
CHOICE = ["v_proj", "o_proj", "down_proj"]


def chosen() -> Placement:
    return place(LLAMA, CHOICE, rank=16, alpha=32)


def one_file(export: Export) -> Any:
    (text,) = export.files.values()
    return yaml.safe_load(text)


# What each framework's documentation shows, for v_proj, o_proj and down_proj (torchtune, torchtitan: what they can).
DOCUMENTED = {
    "openrlhf": "--ds.lora.rank 16 --ds.lora.alpha 32 --ds.lora.target_modules down_proj o_proj v_proj",
    "ms-swift": "--tuner_type lora --lora_rank 16 --lora_alpha 32 --target_modules down_proj o_proj v_proj",
    "llamafactory": "finetuning_type=lora lora_rank=16 lora_alpha=32 lora_target=down_proj,o_proj,v_proj",
    "axolotl": "adapter: lora lora_r: 16 lora_alpha: 32 lora_dropout: 0.0 "
    "lora_target_modules: [down_proj, o_proj, v_proj]",
    "verl": "actor_rollout_ref.model.lora_rank=16 actor_rollout_ref.model.lora_alpha=32 "
    "'actor_rollout_ref.model.target_modules=[down_proj,o_proj,v_proj]'",
    "nemo-rl": "policy.dtensor_cfg.lora_cfg.enabled=true "
    '\'policy.dtensor_cfg.lora_cfg.target_modules=["*.down_proj","*.o_proj","*.v_proj"]\' '
    "'policy.dtensor_cfg.lora_cfg.exclude_modules=[]' policy.dtensor_cfg.lora_cfg.match_all_linear=false "
    "policy.dtensor_cfg.lora_cfg.dim=16 policy.dtensor_cfg.lora_cfg.alpha=32",
    "torchtitan": 'LoRAConverter.Config(rank=16, alpha=32.0, target_modules=["wo", "w2"])',
    "torchtune": "'model.lora_attn_modules=[v_proj,output_proj]' model.apply_lora_to_mlp=false "
    "model.apply_lora_to_output=false model.lora_rank=16 model.lora_alpha=32",
}


@pytest.mark.parametrize("target", DOCUMENTED)
def test_flags_are_those_of_the_documentation(target):
    types = {"torchtune": ["v_proj", "o_proj"], "torchtitan": ["o_proj", "down_proj"]}.get(target, CHOICE)
    export = find_exporter(target).export(place(LLAMA, types, rank=16, alpha=32))
    assert " ".join(export.flags) == DOCUMENTED[target]
    assert export.target == target
    assert not export.widened


@pytest.mark.parametrize("target", sorted(EXPORTERS.own))
def test_every_exporter_is_pure_and_deterministic_and_refuses_foreign_engines(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export = find_exporter(target).export
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"] if target == "tinker" else ["q_proj", "k_proj", "v_proj"]
    placement = place(LLAMA, attention, alpha=32)  # tinker knows the whole of attention alone, and this alpha
    first = export(placement, engine=None, widen=False)
    assert first == export(placement, engine=None, widen=False)
    assert first.files
    assert first.flags
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ExportError, match=rf"--engine is 'jax', but {target} has: "):
        export(placement, engine="jax", widen=False)


def test_files_say_what_the_flags_say():
    for module in (verl, nemo_rl, torchtune):
        placement = place(LLAMA, ["v_proj", "o_proj"])
        export = module.export(placement)
        words = [word for flag in export.flags for word in shlex.split(flag)]
        assert OmegaConf.to_container(OmegaConf.from_dotlist(words)) == one_file(export)
    assert one_file(llamafactory.export(chosen())) == {
        "finetuning_type": "lora", "lora_rank": 16, "lora_alpha": 32, "lora_target": "down_proj,o_proj,v_proj",
    }  # fmt: skip
    assert one_file(ms_swift.export(chosen()))["target_modules"] == ["down_proj", "o_proj", "v_proj"]
    namespace = {"LoRAConverter": argparse.Namespace(Config=dict)}
    titan = torchtitan.export(place(LLAMA, ["q_proj", "o_proj"], rank=16, alpha=32), engine="separate")
    exec(titan.files["lora_converter.py"].split("LoRAConverter\n", 1)[1], namespace)
    assert namespace["lora"] == {"rank": 16, "alpha": 32.0, "target_modules": ["wq", "wo"]}


def test_openrlhf_arguments_parse_as_its_parser_declares_them():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ds.lora.rank", type=int, default=0)
    parser.add_argument("--ds.lora.alpha", type=int, default=16)
    parser.add_argument("--ds.lora.target_modules", type=str, nargs="*", default="all-linear")
    for types in (["v_proj"], CHOICE):
        export = openrlhf.export(place(LLAMA, types))
        for text in (" ".join(export.flags), export.files["openrlhf.args"]):
            found = vars(parser.parse_args(shlex.split(text)))
            assert found == {"ds.lora.rank": 4, "ds.lora.alpha": 8, "ds.lora.target_modules": sorted(types)}


@pytest.mark.parametrize("exporter", [axolotl, ms_swift, verl])
def test_expert_parameters_are_named_as_parameters(exporter):
    placement = place(scores_of(projections_of(model_of("qwen3_moe"))), ["experts.down_proj", "v_proj"])
    text = json.dumps(one_file(exporter.export(placement)))
    assert re.search(r'target_parameters": \["experts.down_proj"\]', text)
    assert re.search(r'target_modules": \["v_proj"\]', text)


@pytest.mark.parametrize("exporter", [openrlhf, llamafactory, nemo_rl, deepspeed, torchtune, torchtitan])
def test_expert_parameters_are_refused_where_they_cannot_be_named(exporter):
    placement = place(scores_of(projections_of(model_of("qwen3_moe"))), ["experts.down_proj", "v_proj"])
    for widen in (False, True):
        with pytest.raises(ExportError, match=r"Nearest choice: "):
            exporter.export(placement, widen=widen)


@pytest.mark.parametrize("exporter", [nemo_rl, deepspeed])
def test_a_weight_that_is_no_linear_is_refused_where_only_linears_are_adapted(exporter):
    placement = place(scores_of(projections_of(model_of("gpt2"))), ["c_fc"])
    with pytest.raises(ExportError, match=r"c_fc is none \(conv1d\)\. Nearest .*placement\.exclude=\[c_fc\]"):
        exporter.export(placement)
    fused = place(scores_of(projections_of(model_of("gpt2"))), ["q_proj", "k_proj", "v_proj"])  # c_attn is one too
    with pytest.raises(ExportError, match=r"c_attn is none \(conv1d\)\. Nearest .*exclude=\[k_proj,q_proj,v_proj\]"):
        exporter.export(fused)


def test_ranks_are_kept_by_axolotl_and_refused_elsewhere():
    placement = place(LLAMA, ["q_proj", "k_proj", "v_proj"], rank_pattern={"v_proj": 16})
    tree = one_file(axolotl.export(placement))
    assert (tree["lora_rank_pattern"], tree["lora_alpha_pattern"]) == ({"v_proj": 16}, {"v_proj": 32})
    for exporter in (verl, nemo_rl, openrlhf, ms_swift, llamafactory, torchtitan, deepspeed, megatron_bridge):
        with pytest.raises(ExportError, match=r"one LoRA rank for all modules.*rank 16 everywhere \(--widen\)"):
            exporter.export(placement)
        assert exporter.export(placement, widen=True).widened == ("rank 16 everywhere instead of ranks 4, 16.",)
    with pytest.raises(ExportError, match=r"whole number as alpha, but the placement has alpha 2\.5"):
        verl.export(place(LLAMA, CHOICE, alpha=2.5))


def test_torchtune_says_what_it_cannot_choose():
    with pytest.raises(ExportError, match=r"cannot adapt down_proj alone.*gate_proj, up_proj as well \(--widen\)"):
        torchtune.export(chosen())
    widened = torchtune.export(chosen(), widen=True)
    assert one_file(widened)["model"]["apply_lora_to_mlp"] is True
    assert widened.widened == ("apply_lora_to_mlp adapts gate_proj, up_proj as well as down_proj.",)
    mlp = place(LLAMA, ["gate_proj", "up_proj", "down_proj"])
    with pytest.raises(ExportError, match=r"at least one attention projection.*q_proj as well"):
        torchtune.export(mlp)
    assert one_file(torchtune.export(mlp, widen=True))["model"]["lora_attn_modules"] == ["q_proj"]
    layer = place(LLAMA, ["o_proj"], where=lambda item: item.layer == 0)
    for exporter in (torchtune, torchtitan):
        with pytest.raises(ExportError, match=r"in every layer, but the placement leaves out model.layers.1"):
            exporter.export(layer)
        assert exporter.export(layer, widen=True).widened == ("o_proj are adapted in every layer: 1 modules more.",)


def test_torchtitan_refuses_a_part_of_its_shared_linears():
    with pytest.raises(ExportError, match=r"wqkv whole.*v_proj\. Nearest choice: q_proj, k_proj as well.*--engine sep"):
        torchtitan.export(chosen())
    widened = torchtitan.export(chosen(), widen=True)
    assert 'target_modules=["wqkv", "wo", "w2"]' in widened.flags[0]
    assert widened.widened == ("wqkv is adapted whole: q_proj, k_proj as well as v_proj.",)
    # rank 16 on wqkv (32 + 64), wo (32 + 32) and w2 (48 + 32), in two layers
    assert widened.notes[0] == "7,680 trainable parameters instead of the placement's 6,144."
    with pytest.raises(ExportError, match=r"wkv whole.*v_proj\. Nearest choice: k_proj as well \(--widen\), or place"):
        torchtitan.export(chosen(), engine="separate")
    latent = [projection(f"model.layers.0.self_attn.{name}", 8, 8) for name in ("q_proj", "kv_b_proj", "o_proj")]
    assert '["wq", "wo"]' in torchtitan.export(place(scores_of(latent), ["q_proj", "o_proj"])).flags[0]


def lookalikes() -> list[Any]:
    """Return projections whose names contain one another."""
    gated = [projection(f"model.layers.{layer}.mlp.gate_up_proj", 32, 96) for layer in range(12)]
    other = [projection(f"vision.blocks.{layer}.mlp.up_proj", 32, 32) for layer in range(2)]
    return [*llama_projections(12), *gated, *other]


@pytest.mark.parametrize(
    "where",
    [
        lambda item: item.type == "up_proj",
        lambda item: item.type == "gate_up_proj",
        lambda item: item.type == "up_proj" and "vision" not in item.fqn,
        lambda item: item.layer == 1 and "vision" not in item.fqn,
        lambda item: item.fqn == "model.layers.1.mlp.up_proj",
    ],
)
def test_no_name_reaches_a_longer_name_another_tower_or_layer_ten(where):
    from deepspeed.linear import LoRAConfig, OptimizedLinear

    placement = place(scores_of(lookalikes()), where=where)
    config = placement.to_deepspeed()
    assert isinstance(config, LoRAConfig)
    assert (config.lora_r, config.lora_alpha) == (4, 8)
    assert placement.to_deepspeed(r=16, lora_alpha=32).lora_r == 16
    assert json.loads(deepspeed.export(placement).files["deepspeed_lora.json"])["target_mods"] == config.target_mods
    # The real matcher decides when weights are loaded: a linear that no target name hits is disabled.
    config.delay_lora_init = True
    adapted = set()
    for module in placement.source.modules:
        linear = OptimizedLinear(4, 4, lora_config=config, dtype=torch.float32, device="cpu")
        linear._load_from_state_dict(
            {f"{module.fqn}.weight": torch.zeros(4, 4)}, f"{module.fqn}.", {}, True, [], [], []
        )
        if not linear.disabled:
            adapted.add(module.fqn)
    assert adapted == set(placement.modules)
    matches = matcher(one_file(ms_swift.export(placement))["target_modules"])
    assert {m.fqn for m in placement.source.modules if matches(m.fqn)} == set(placement.modules)
    patterns = one_file(nemo_rl.export(placement))["policy"]["dtensor_cfg"]["lora_cfg"]["target_modules"]
    regexes = [re.compile(pattern.replace("*", ".*")) for pattern in patterns]
    hit = {m.fqn for m in placement.source.modules if any(regex.fullmatch(m.fqn) for regex in regexes)}
    assert hit == set(placement.modules)
