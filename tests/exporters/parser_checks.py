"""What a framework that is no dependency of ours makes of an export.

`python -m tests.exporters.parser_checks NAME DIRECTORY`.

Each runs in a process of its own, with the framework (DIRECTORY, from tests/parsers/NAME.txt) last on the path, so
that nothing of it reaches the other tests and nothing in .venv is hidden. Where its code that adapts a model can be
called on the CPU, what that adapts is compared with the placement; else its own parser reads the export, and PEFT is
then given what its trainer would give it.
"""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import importlib.util
import os
import shlex
import sys
import tempfile
import typing
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import HfArgumentParser

from plop_dist.backends.megatron.bridge import import_bridge
from plop_dist.exporters.exporter import find_exporter
from plop_dist.values.placement import Export, Placement
from tests.exporters.cases import (
    adapted_paths,
    chosen_paths,
    model_of,
    place,
    projection,
    projections_of,
    scores_of,
)
from tests.exporters.hostile import NAMES
from tests.models import save_tiny

axolotl, llamafactory, ms_swift, openrlhf = map(find_exporter, ("axolotl", "llamafactory", "ms-swift", "openrlhf"))
megatron_swift, nemo_rl, torchtitan = map(find_exporter, ("megatron-swift", "nemo-rl", "torchtitan"))
skyrl, torchtune, verl = map(find_exporter, ("skyrl", "torchtune", "verl"))

CHOICE = ("v_proj", "o_proj", "down_proj")


def placements(family: str = "llama") -> Iterator[Placement]:
    """Yield one type alone, several types, and single layers of a tiny model."""
    scores = scores_of(projections_of(model_of(family)))
    yield place(scores, ["v_proj"], rank=16, alpha=32)
    yield place(scores, CHOICE, rank=16, alpha=32)
    yield place(scores, CHOICE, where=lambda item: item.layer == 1)


def expert_placement() -> Placement:
    """Return a placement of routed experts, which only target_parameters reach, beside attention."""
    return place(scores_of(projections_of(model_of("qwen3_moe"))), ["experts.down_proj", "v_proj"])


def words(export: Export) -> list[str]:
    """Return the exported flags as a shell splits them."""
    return [word for flag in export.flags for word in shlex.split(flag)]


def file_tree(export: Export) -> dict[str, Any]:
    """Return the one exported YAML file."""
    (text,) = export.files.values()
    return yaml.safe_load(text)


def assert_adapted(model: nn.Module, placement: Placement) -> None:
    """Assert that exactly the chosen modules carry LoRA, with as many parameters as the placement says."""
    assert adapted_paths(model) == chosen_paths(placement)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count == placement.num_trainable_parameters, (count, placement.num_trainable_parameters)


def adapt(family: str, **fields: Any) -> nn.Module:
    """Return a copy of the tiny model with PEFT's LoRA."""
    return get_peft_model(copy.deepcopy(model_of(family)), LoraConfig(task_type="CAUSAL_LM", **fields))


def check_llamafactory() -> None:
    os.environ["DISABLE_VERSION_CHECK"] = "1"  # LLaMA-Factory 0.9 refuses transformers above 5.6 at import
    import trl

    # Only its PPO needs this class, which TRL 1 has no more; it is imported with everything else.
    trl.AutoModelForCausalLMWithValueHead = object  # type: ignore[attr-defined]
    from llamafactory.hparams import FinetuningArguments, ModelArguments
    from llamafactory.model.adapter import _setup_lora_tuning

    for placement in placements():
        export = llamafactory.export(placement)
        # As read_args does with a YAML file and overrides after it.
        from_flags = OmegaConf.to_container(OmegaConf.from_cli(words(export)))
        for tree in (file_tree(export), from_flags):
            (arguments,) = HfArgumentParser(FinetuningArguments).parse_dict(tree)
            assert arguments.finetuning_type == "lora"
            model = copy.deepcopy(model_of("llama"))
            name = ModelArguments(model_name_or_path="tiny")
            assert_adapted(_setup_lora_tuning(model.config, model, name, arguments, True, False), placement)
            assert (arguments.lora_rank, arguments.lora_alpha) == (placement.rank, placement.alpha)


def check_axolotl() -> None:
    from axolotl.utils.schemas.peft import LoraConfig as AxolotlConfig

    scores = scores_of(projections_of(model_of("llama")))
    ranked = place(scores, CHOICE, rank_pattern={"v_proj": 16, "model.layers.1.mlp.down_proj": 2})
    for family, placement in [
        *(("llama", item) for item in (*placements(), ranked)),
        ("qwen3_moe", expert_placement()),
    ]:
        tree = file_tree(axolotl.export(placement))
        assert set(tree) <= {*AxolotlConfig.model_fields, "adapter"}
        config = AxolotlConfig(**tree)
        model = adapt(
            family,
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.lora_target_modules,
            target_parameters=config.lora_target_parameters or [],
            rank_pattern=config.lora_rank_pattern or {},
            alpha_pattern=config.lora_alpha_pattern or {},
        )
        assert_adapted(model, placement)


def check_verl() -> None:
    import verl as verl_package
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config.megatron_peft import get_peft_cls
    from verl.workers.config.model import HFModelConfig

    def read(trainer: str, export: Export) -> HFModelConfig:
        section = compose(f"ppo_{trainer}", overrides=[*words(export), f"actor_rollout_ref.model.path={path}"])
        # The file is the same: laid over the trainer's own configuration it changes nothing any more.
        assert OmegaConf.merge(section, OmegaConf.create(file_tree(export))) == section
        return omega_conf_to_dataclass(section.actor_rollout_ref.model, dataclass_type=HFModelConfig)

    configs = str(Path(verl_package.__file__).parent / "trainer" / "config")
    with tempfile.TemporaryDirectory() as path, initialize_config_dir(config_dir=configs, version_base=None):
        save_tiny("llama", path)
        for family, placement in [*(("llama", item) for item in placements()), ("qwen3_moe", expert_placement())]:
            config = read("trainer", verl.export(placement))
            model = adapt(
                family,
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                target_modules=config.target_modules,
                target_parameters=config.target_parameters,
                exclude_modules=config.exclude_modules,
            )
            assert_adapted(model, placement)
        for name in NAMES:
            hostile = [projection(f"model.layers.0.self_attn.{name}", 8, 8)]
            placement = place(scores_of([*projections_of(model_of("llama")), *hostile]), [name, "v_proj"])
            assert name in read("trainer", verl.export(placement)).target_modules
        if importlib.util.find_spec("megatron") is None:  # Python 3.11
            return
        import_bridge()
        for placement in placements():
            config = read("megatron_trainer", verl.export(placement, engine="megatron"))
            assert "plop_dist.canonical_lora" in sys.modules  # what external_lib is there for
            peft = get_peft_cls(config, bridge=object(), provider=object())
            wanted = placement.to_megatron()
            assert isinstance(wanted, type(peft))  # Bridge's class, which external_lib has mended
            assert (peft.target_modules, peft.dim, peft.alpha) == (wanted.target_modules, wanted.dim, wanted.alpha)


def check_skyrl() -> None:
    from skyrl.train.config import SkyRLTrainConfig

    def read(export: Export) -> Any:
        config = SkyRLTrainConfig.from_cli_overrides(words(export))
        assert SkyRLTrainConfig.from_dict_config(OmegaConf.create(file_tree(export))) == config
        return config.trainer

    for placement in placements():
        trainer = read(skyrl.export(placement))
        lora = trainer.policy.model.lora
        assert trainer.strategy == "fsdp"
        names = lora.target_modules
        assert_adapted(adapt("llama", r=lora.rank, lora_alpha=lora.alpha, target_modules=names), placement)
    for name in NAMES:
        hostile = [projection(f"model.layers.0.self_attn.{name}", 8, 8)]
        placement = place(scores_of([*projections_of(model_of("llama")), *hostile]), [name, "v_proj"])
        assert name in read(skyrl.export(placement)).policy.model.lora.target_modules
    if importlib.util.find_spec("megatron") is None:  # Python 3.11
        return
    import_bridge()
    for placement in placements():
        trainer, wanted = read(skyrl.export(placement, engine="megatron")), placement.to_megatron()
        lora, own = trainer.policy.model.lora, trainer.policy.megatron_config.lora_config
        kind = {"CanonicalLoRA": "canonical_lora", "LoRA": "lora"}[type(wanted).__name__]
        assert (trainer.strategy, own.lora_type, own.merge_lora) == ("megatron", kind, False)
        assert (lora.target_modules, lora.rank, lora.alpha) == (wanted.target_modules, wanted.dim, wanted.alpha)


def check_openrlhf() -> None:
    # Its scripts import flash_attn and define their parser only under __main__: exactly these statements are run.
    scripts = Path(str(importlib.util.find_spec("openrlhf").submodule_search_locations[0])) / "cli"
    for name in ("train_sft", "train_dpo", "train_rm", "train_ppo_ray"):
        script = ast.parse((scripts / f"{name}.py").read_text()).body
        (main,) = [node for node in script if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
        defining = [node for node in main.body if ast.unparse(node).startswith("parser")]
        namespace: dict[str, Any] = {"argparse": argparse, "datetime": datetime}
        exec(compile(ast.Module(defining, []), name, "exec"), namespace)
        for placement in placements():
            found = vars(namespace["parser"].parse_args(words(openrlhf.export(placement))))
            model = adapt(
                "llama",
                r=found["ds.lora.rank"],
                lora_alpha=found["ds.lora.alpha"],
                target_modules=found["ds.lora.target_modules"],
            )
            assert_adapted(model, placement)


def check_ms_swift() -> None:
    import swift
    from swift.arguments import TunerArguments
    from swift.pipelines.train.tuner import get_target_modules

    parser = HfArgumentParser(_without_checks(TunerArguments))
    cases = [*(("llama", item) for item in placements()), ("qwen3_moe", expert_placement())]
    only_experts = place(scores_of(projections_of(model_of("qwen3_moe"))), ["experts.down_proj"])
    for family, placement in [*cases, ("qwen3_moe", only_experts)]:
        export = ms_swift.export(placement)
        flags = words(export)
        kind = flags.index("--tuner_type")  # a field of the arguments around these
        assert flags[kind + 1] == "lora"
        (arguments,) = parser.parse_args_into_dataclasses(flags[:kind] + flags[kind + 2 :])
        (from_file,) = parser.parse_dict({k: v for k, v in file_tree(export).items() if k != "tuner_type"})
        assert vars(from_file) == vars(arguments)
        arguments.target_modules = arguments.target_regex or arguments.target_modules  # its __post_init__
        model = adapt(
            family,
            r=arguments.lora_rank,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=get_target_modules(arguments, model_of(family)),
            target_parameters=arguments.target_parameters,
        )
        assert_adapted(model, placement)
    _check_megatron_swift(Path(swift.__file__).parent / "megatron" / "arguments" / "megatron_args.py")


def _check_megatron_swift(source: Path) -> None:
    # It cannot be imported without Transformer Engine: its arguments' fields are read from its own source.
    (mixin,) = [
        node for node in ast.parse(source.read_text()).body if getattr(node, "name", "") == "MegatronTunerMixin"
    ]
    namespace = {**vars(typing), **vars(dataclasses), "__name__": __name__}
    exec(compile(ast.Module([mixin], []), str(source), "exec", dont_inherit=True), namespace)
    parser = HfArgumentParser(_without_checks(namespace["MegatronTunerMixin"]))
    scores = scores_of(projections_of(model_of("llama")))
    for types in (["o_proj"], ["q_proj", "k_proj", "v_proj", "down_proj"]):
        export = megatron_swift.export(place(scores, types, rank=16, alpha=32))
        (arguments,) = parser.parse_args_into_dataclasses(words(export))
        (from_file,) = parser.parse_dict(file_tree(export))
        assert vars(from_file) == vars(arguments)
        assert (arguments.tuner_type, arguments.lora_rank, arguments.lora_alpha) == ("lora", 16, 32)
        wanted = ["linear_proj"] if types == ["o_proj"] else ["linear_qkv", "linear_fc2"]
        assert arguments.target_modules == wanted


def _without_checks(arguments: type) -> type:
    """Return the dataclass without its __post_init__, which asks the arguments around it for the model."""
    return dataclasses.dataclass(type(arguments.__name__, (arguments,), {"__post_init__": lambda self: None}))


def check_nemo_automodel() -> None:
    from nemo_automodel.components._peft.lora import PeftConfig, apply_lora_to_linear_modules

    head = place(scores_of(projections_of(model_of("llama"))), ["lm_head", "up_proj"])
    for placement in (*placements(), head):
        section = file_tree(nemo_rl.export(placement))["policy"]["dtensor_cfg"]["lora_cfg"]
        assert section.pop("enabled") is True
        assert set(section) <= {field.name for field in dataclasses.fields(PeftConfig)}
        model = copy.deepcopy(model_of("llama"))
        apply_lora_to_linear_modules(model, PeftConfig.from_dict({**section, "use_memory_efficient_lora": False}))
        found = {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")}
        assert found == set(placement.modules)
        count = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
        assert count == placement.num_trainable_parameters


def check_torchtune() -> None:
    from torchtune.models.llama3_1 import lora_llama3_1
    from torchtune.modules.peft import get_adapter_params

    sizes = {"vocab_size": 128, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "embed_dim": 64}
    names = {"q_proj": "attn.q_proj", "k_proj": "attn.k_proj", "v_proj": "attn.v_proj", "o_proj": "attn.output_proj",
             "gate_proj": "mlp.w1", "down_proj": "mlp.w2", "up_proj": "mlp.w3"}  # fmt: skip
    scores = scores_of(projections_of(model_of("llama")))
    mlp = ["gate_proj", "up_proj", "down_proj"]
    for types in (["v_proj"], ["v_proj", "o_proj"], ["k_proj", *mlp], ["q_proj", "lm_head"]):
        placement = place(scores, types)
        model = OmegaConf.to_container(OmegaConf.from_dotlist(words(torchtune.export(placement))))["model"]
        assert model == file_tree(torchtune.export(placement))["model"]
        parameters = get_adapter_params(
            lora_llama3_1(**model, **sizes, intermediate_dim=96, max_seq_len=16, rope_base=10_000)
        )
        found = {name.rpartition(".lora_")[0] for name in parameters}
        wanted = {f"layers.{item.layer}.{names[item.type]}" for item in placement.chosen if item.type in names}
        assert found == wanted | ({"output"} if "lm_head" in types else set())
        assert sum(parameter.numel() for parameter in parameters.values()) == placement.num_trainable_parameters


def check_torchtitan() -> None:
    from torchtitan.models.llama3 import llama3_configs
    from torchtitan.models.qwen3 import qwen3_configs

    fused, separate = llama3_configs["debugmodel"], qwen3_configs["debugmodel_non_fused_qkv"]
    cases = [
        (fused, "fused", ["o_proj", "down_proj"], {"wo", "w2"}),
        (fused, "fused", ["q_proj", "k_proj", "v_proj", "up_proj"], {"wqkv", "w3"}),
        (fused, "fused", ["lm_head", "gate_proj"], {"lm_head", "w1"}),
        (separate, "separate", ["q_proj", "o_proj"], {"wq", "wo"}),
        (separate, "separate", ["k_proj", "v_proj"], {"wk", "wv"}),
    ]
    for build, engine, types, names in cases:
        config = build("flex")
        placement = place(scores_of(_torchtitan_projections(config)), types)
        export = torchtitan.export(placement, engine=engine)
        namespace: dict[str, Any] = {}
        exec(export.files["lora_converter.py"], namespace)
        with torch.device("meta"):
            model = namespace["lora"].build().convert(config).build()
        adapted = [name.removesuffix(".lora_a") for name, _ in model.named_modules() if name.endswith(".lora_a")]
        layers = {name.split(".")[1] for name in adapted if name.startswith("layers.")}
        assert {name.rpartition(".")[2] for name in adapted} == names
        assert len(adapted) == sum(1 if name == "lm_head" else len(config.layers) for name in names)
        assert layers == {str(layer) for layer in range(len(config.layers))}
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        noted = [note for note in export.notes if "trainable parameters instead" in note]
        assert noted == [] if count == placement.num_trainable_parameters else noted[0].startswith(f"{count:,} ")


def _torchtitan_projections(config: Any) -> list[Any]:
    """Return the projections of the Hugging Face model that a torchtitan configuration describes."""
    found = [projection("lm_head", config.dim, config.vocab_size)]
    for layer, block in enumerate(config.layers):
        attention, mlp = block.attention, block.feed_forward
        head_dim = attention.qkv_linear.head_dim
        num_kv_heads = attention.n_kv_heads or attention.n_heads
        sizes = {
            "self_attn.q_proj": (config.dim, attention.n_heads * head_dim),
            "self_attn.k_proj": (config.dim, num_kv_heads * head_dim),
            "self_attn.v_proj": (config.dim, num_kv_heads * head_dim),
            "self_attn.o_proj": (attention.n_heads * head_dim, config.dim),
            "mlp.gate_proj": (config.dim, mlp.w1.out_features),
            "mlp.up_proj": (config.dim, mlp.w1.out_features),
            "mlp.down_proj": (mlp.w1.out_features, config.dim),
        }
        found += [projection(f"model.layers.{layer}.{name}", *size) for name, size in sizes.items()]
    return found


CHECKS = {
    "axolotl": check_axolotl,
    "llamafactory": check_llamafactory,
    "ms-swift": check_ms_swift,
    "nemo-automodel": check_nemo_automodel,
    "openrlhf": check_openrlhf,
    "skyrl": check_skyrl,
    "torchtitan": check_torchtitan,
    "torchtune": check_torchtune,
    "verl": check_verl,
}

if __name__ == "__main__":
    sys.path.append(sys.argv[2])
    CHECKS[sys.argv[1]]()
