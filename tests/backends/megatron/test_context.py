"""Context parallelism: which rank has which tokens. Attention across ranks is a gathered stand-in, no kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.backends.megatron.models import config, fresh, gains, samples, true_gains, worst
from tests.installed import needs_bridge
from tests.models import save_tiny
from tests.spawn import run_ranks
from tests.te_on_cpu.install import needs_te, specified

pytestmark = [pytest.mark.slow, needs_bridge, needs_te]
FAMILIES = ("llama", "mistral", "qwen3_moe")
MISTRAL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
           "num_key_value_heads": 4, "sliding_window": 4}  # fmt: skip
SP = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[int, list[tuple[str, dict[str, Any]]]] = {
    2: [("llama", {"cp": 2}), ("mistral", {"cp": 2}), ("qwen3_moe", {"cp": 2}), ("qwen3_moe", {"cp": 2, "ep": 2})],
    4: [("llama", {"cp": 4}), ("llama", {"cp": 2, **SP}), ("qwen3_moe", {"cp": 2, "pp": 2}),
        ("qwen3_moe", {"cp": 2, "dp": 2, "ep": 4})],
}  # fmt: skip


def _compare(rank: int, root: Path, layouts: list[tuple[str, dict[str, Any]]]) -> list[tuple[float, str]]:
    from plop_dist.backends.megatron.backend import load

    truth = {family: true_gains(root / family, samples()) for family, _ in layouts}
    found = []
    for family, layout in layouts:
        found.append(worst(gains(load(config(root / family, **layout)), samples(), side="left"), truth[family]))
        fresh()
    return found


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.rare)])
def test_every_token_is_counted_once_and_sees_its_row(tmp_path: Path, world_size: int) -> None:
    for family in FAMILIES:
        save_tiny(family, tmp_path / family, **(MISTRAL if family == "mistral" else {}))
    layouts = LAYOUTS[world_size]
    for report in run_ranks(world_size, specified, "transformer_engine", _compare, tmp_path, layouts):
        for (family, layout), (error, where) in zip(layouts, report, strict=True):
            assert error < 1e-5, f"{family} {layout}: {where} is off by {error}"
