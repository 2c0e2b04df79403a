"""What a module costs at each size: measured on real runs, told as ratios to the smallest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from plop_dist.costs.scale import Scale, measure_size
from plop_dist.report.cost_tables import print_scale
from plop_dist.values.scores import Scores
from tests.cli.cases import plop_dist

STEPS = {
    "score", "score: baseline", "score: forward", "place, module budget, explained", "report", "export to peft",
    "export to megatron-bridge",
}  # fmt: skip


def test_ratios_are_per_module_and_to_the_smallest(capsys: pytest.CaptureFixture[str]) -> None:
    small, large = (Scale(num, 2 * num, {"score": seconds}, 1 << 20) for num, seconds in ((100, 1.0), (1000, 15.0)))
    assert large.per_module("score") / small.per_module("score") == pytest.approx(1.5)
    print_scale([small, large])
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("score"))
    assert row == ["score", "1.00", "15.00", "10000", "1.00", "1.50"]


@pytest.mark.slow
def test_every_step_runs_on_a_model_with_experts(tmp_path: Path) -> None:
    scale = measure_size([sys.executable, "-m", "plop_dist.cli"], 1, tmp_path)
    assert scale.num_sites == 261
    assert scale.num_modules == len(Scores.from_file(tmp_path / "scores.json").modules) > 300
    assert scale.seconds.keys() == STEPS
    assert min(scale.seconds[step] for step in STEPS - {"report"}) > 0
    assert scale.report_peak_bytes > 10 << 20
    assert (tmp_path / "report.html").is_file()
    assert {path.name for path in (tmp_path / "exports").iterdir()} == {"peft", "megatron-bridge"}


def test_without_a_configuration_bench_says_what_is_missing() -> None:
    outcome = plop_dist("bench")
    assert outcome.status == 2
    assert "Missing argument 'CONFIG'" in outcome.err
