"""Placement -> the parsers of frameworks that are no dependency of this project: those that can be imported here.

Each of these tests is skipped where its framework (or something that framework needs) is not installed; the formats are
then held by the documented examples in test_exporters_frameworks.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from typing import Any

import pytest
import torch

from plop_dist.exporters import axolotl, llamafactory, nemo_rl, torchtitan, verl
from plop_dist.types import Placement
from tests.export_cases import place
from tests.test_exporters_frameworks import LLAMA, chosen, one_file


def check_llamafactory(module: Any, placement: Placement) -> None:
    arguments = module.FinetuningArguments(**one_file(llamafactory.export(placement)))
    assert set(arguments.lora_target) == set(placement.module_types)
    assert (arguments.lora_rank, arguments.lora_alpha) == (16, 32)


def check_axolotl(module: Any, placement: Placement) -> None:
    tree = one_file(axolotl.export(placement))
    config = module.LoraConfig(**tree)
    assert set(config.lora_target_modules) == set(placement.module_types)
    assert (config.lora_r, config.lora_alpha) == (16, 32)
    assert set(tree) <= set(module.LoraConfig.model_fields) | {"adapter"}


def check_verl(module: Any, placement: Placement) -> None:
    fields = {field.name for field in dataclasses.fields(module.HFModelConfig)}
    assert set(one_file(verl.export(placement))["actor_rollout_ref"]["model"]) <= fields
    assert set(one_file(verl.export(placement, engine="megatron"))["actor_rollout_ref"]["model"]) <= fields


def check_torchtitan(module: Any, placement: Placement) -> None:
    namespace: dict[str, Any] = {}
    exec(torchtitan.export(placement).files["lora_converter.py"], namespace)
    converter = module.LoRAConverter(namespace["lora"])
    assert (converter.rank, converter.alpha, converter.target_modules) == (16, 32.0, {"wv", "wo", "w2"})


def check_automodel(module: Any, placement: Placement) -> None:
    section = one_file(nemo_rl.export(placement))["policy"]["dtensor_cfg"]["lora_cfg"]
    match = module.ModuleMatcher(
        section["target_modules"], section["exclude_modules"], section["match_all_linear"]
    ).match
    assert {m.fqn for m in placement.source.modules if match(torch.nn.Identity(), m.fqn)} == set(placement.modules)


def check_hydra(module: Any, placement: Placement) -> None:
    parser = module.OverridesParser.create()
    for export in (
        verl.export(placement),
        verl.export(place(LLAMA, where=lambda item: item.layer == 1), engine="megatron"),
        nemo_rl.export(placement),
    ):
        words = [word for flag in export.flags for word in shlex.split(flag)]
        tree: dict[str, Any] = {}
        for override in parser.parse_overrides(words):
            *sections, last = override.key_or_group.split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, {})
            value = override.value()
            node[last] = [str(item) for item in value] if isinstance(value, list) else value
        assert json.loads(json.dumps(tree, default=str)) == one_file(export)


REAL = [
    ("llamafactory.hparams.finetuning_args", check_llamafactory),
    ("axolotl.utils.schemas.peft", check_axolotl),
    ("verl.workers.config.model", check_verl),
    ("torchtitan.components.lora", check_torchtitan),
    ("nemo_automodel.components._peft.module_matcher", check_automodel),
    ("hydra.core.override_parser.overrides_parser", check_hydra),
]


@pytest.mark.parametrize(("name", "check"), REAL, ids=[name.partition(".")[0] for name, _ in REAL])
def test_the_real_parser_reads_the_export(name: str, check: Callable[[Any, Placement], None], monkeypatch):
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")  # LLaMA-Factory 0.9 refuses transformers above 5.6 at import
    check(pytest.importorskip(name, exc_type=ImportError), chosen())
