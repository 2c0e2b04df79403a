"""Megatron at every layout: the same logits as transformers, and the same gains as one float64 process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from plop_dist.config.schema import EstimatorConfig
from plop_dist.measure.baseline import compute_baselines
from plop_dist.measure.collectives import Reducer
from plop_dist.measure.norms import control_variate, directions
from tests.backends.megatron.models import config, fresh, gains, logits, samples, true_gains, true_logits, worst
from tests.backends.megatron.test_checkpoint import LATENT
from tests.installed import needs_bridge
from tests.models import save_tiny
from tests.spawn import run_ranks
from tests.te_on_cpu.install import each_specification_rarely, specified

pytestmark = [pytest.mark.slow, needs_bridge]
TOLERANCE = 1e-5

SP = {"sequence_parallel": True}
TWO_RANKS = [
    ("llama", {"tp": 2}, "left"),
    ("qwen2", {"tp": 2}, "right"),
    ("qwen3", {"tp": 2, **SP}, "left"),
    ("tied", {"pp": 2}, "right"),
    ("odd_vocab", {"tp": 2}, "left"),
    ("llama", {"dp": 2}, "left"),
    ("qwen3_moe", {"tp": 2}, "right"),
    ("qwen3_moe", {"tp": 2, **SP}, "left"),
    ("qwen3_moe", {"dp": 2, "ep": 2}, "left"),
    ("qwen3_moe", {"tp": 2, "ep": 2}, "right"),
    ("qwen3_moe", {"tp": 2, "ep": 2, **SP}, "left"),
]
FOUR_RANKS = [
    ("llama", {"tp": 4}, "right"),
    ("qwen2", {"tp": 2, "pp": 2}, "left"),
    ("qwen3", {"tp": 2, "dp": 2}, "right"),
    ("qwen2", {"tp": 2, "dp": 2, **SP}, "left"),
    ("odd_vocab", {"tp": 2, "pp": 2, **SP}, "right"),
    ("qwen3_moe", {"tp": 2, "dp": 2, "ep": 2, **SP}, "left"),
    ("qwen3_moe", {"tp": 2, "dp": 2, "ep": 4, **SP}, "right"),
    ("qwen3_moe", {"pp": 2, "dp": 2, "ep": 2}, "left"),
    ("qwen3_moe", {"tp": 2, "pp": 2, "ep": 2, **SP}, "right"),
    ("deepseek_v3", {"tp": 2, "pp": 2, "ep": 2, **SP}, "left"),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("megatron")
    for family in ("llama", "qwen2", "qwen3", "qwen3_moe"):
        save_tiny(family, root / family)
    save_tiny("deepseek_v3", root / "deepseek_v3", **LATENT)
    save_tiny("llama", root / "tied", tie_word_embeddings=True)
    save_tiny("llama", root / "odd_vocab", vocab_size=129)
    return root


def _compare(rank: int, root: Path, layouts: list[Any]) -> list[Any]:
    from plop_dist.backends.megatron.backend import load

    truth: dict[str, Any] = {}
    report = []
    for family, layout, side in layouts:
        directory = root / family
        if family not in truth:
            truth[family] = (true_gains(directory, samples()), true_logits(directory, samples()[1]))
        model = load(config(directory, **layout))
        true, expected = truth[family]
        error, where = worst(gains(model, samples(), side=side), true)
        got = logits(model, samples()[1])
        off = 0.0 if got is None else float((got[:, : expected.shape[1]] - expected).abs().max() / expected.abs().max())
        fqns = sorted(true)
        found = compute_baselines(model, EstimatorConfig(num_directions=16), Reducer(model.groups), fqns)
        report.append((f"{family} {layout} {side}", error, where, off, {fqn: b.value for fqn, b in found.items()}))
        fresh()
    return report


def _check(reports: list[Any], root: Path, layouts: list[Any]) -> None:
    for rank_report in reports:
        for (family, _, _), (name, error, where, off, baselines) in zip(layouts, rank_report, strict=True):
            assert error < TOLERANCE, f"{name}: {where} is off by {error}"
            assert off < 1e-5, f"{name}: logits are off by {off}"
            for fqn, value in _true_baselines(root / family).items():
                assert value == pytest.approx(baselines[fqn], rel=1e-5), f"{name}: b({fqn})"


_BASELINES: dict[Path, dict[str, float]] = {}


def _true_baselines(directory: Path) -> dict[str, float]:
    """b(W) of every projection from the Hugging Face weights, with the same directions."""
    from transformers import AutoModelForCausalLM

    if directory in _BASELINES:
        return _BASELINES[directory]
    weights: dict[str, torch.Tensor] = {}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__.lower().endswith("topkrouter"):
            weights[path] = module.weight.detach()
    for path, parameter in model.named_parameters():
        if parameter.dim() == 3 and path.endswith("experts.gate_up_proj"):
            for expert, weight in enumerate(parameter.detach()):
                owner = f"{path.removesuffix('.gate_up_proj')}.{expert}"
                weights[f"{owner}.gate_proj"], weights[f"{owner}.up_proj"] = weight.chunk(2)
        elif parameter.dim() == 3:
            for expert, weight in enumerate(parameter.detach()):
                weights[f"{path.removesuffix('.down_proj')}.{expert}.down_proj"] = weight
    found = {}
    for fqn, weight in weights.items():
        x_K = (directions(0, fqn, 16, weight.shape[1]).double() @ weight.T).square().sum(dim=1)
        found[fqn] = control_variate(x_K, float(weight.square().sum()), weight.shape[1]).value
    return _BASELINES.setdefault(directory, found)


@each_specification_rarely
def test_two_ranks_equal_one_process(checkpoints: Path, specification: str) -> None:
    reports = run_ranks(2, specified, specification, _compare, checkpoints, TWO_RANKS)
    _check(reports, checkpoints, TWO_RANKS)


@each_specification_rarely
def test_four_ranks_equal_one_process(checkpoints: Path, specification: str) -> None:
    reports = run_ranks(4, specified, specification, _compare, checkpoints, FOUR_RANKS)
    _check(reports, checkpoints, FOUR_RANKS)
