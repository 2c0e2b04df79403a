"""compare.json is read as what it must be; what is shown of it says what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plop_dist.compare.result import Comparison
from plop_dist.errors import ScoresError
from plop_dist.report.comparison import print_comparison, summary
from plop_dist.report.forest import forest_figure, rates_panel
from plop_dist.values.console import VisibleConsole


def made(**changes: Any) -> dict[str, Any]:
    """Return the tree of a comparison of four arms, one of which diverged."""

    def arm(name: str, value: float | None, rates: tuple[float, ...]) -> dict[str, Any]:
        runs = [
            {"learning_rate": rate, "seed": seed, "steps": 20, "value": value, "choosing": value}
            for rate in rates
            for seed in (0, 1)
        ]
        return {
            "arm": name, "module_types": ["v_proj"], "rank": 8, "alpha": 16.0, "num_trainable_parameters": 100,
            "deviation": 0.01, "learning_rate": rates[0], "bracketed": len(rates) > 2, "runs": runs, "value": value,
            "cost": {"tokens_per_second": 100.0, "peak_memory_bytes": 10**9},
        }  # fmt: skip

    def against(name: str, difference: float | None, verdict: str) -> dict[str, Any]:
        ends = None if difference is None else [difference - 0.02, difference + 0.02]
        return {
            "arm": "lowest_k", "against": name, "difference": difference, "ci95": ends, "p_adjusted": 0.5,
            "smallest_detectable": 0.03, "verdict": verdict,
        }  # fmt: skip

    tree = {
        "schema": "plop-dist/compare/1", "method": "sft", "measure": "held-out loss", "budget": 100, "base": 2.0,
        "margin": 0.03, "rows": {"choosing": 8, "reported": 8}, "versions": {},
        "arms": [arm("lowest_k", 1.5, (0.1, 0.2, 0.4)), arm("all", 1.6, (0.1,)), arm("mlp", 1.5, (0.2,)),
                 arm("attention", None, (0.4,))],
        "comparisons": [against("all", 0.1, "better"), against("mlp", 0.0, "no difference larger than 0.02"),
                        against("attention", None, "undecided, attention diverged")],
        "cost": {"runs": 8, "steps": 160, "seconds": 10.0},
    }  # fmt: skip
    return {**tree, **changes}


def test_table_and_sentence_fit_eighty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    found = Comparison.model_validate(made())
    print_comparison(found, VisibleConsole(width=80))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:6])) <= 80
    assert lines[3].split() == ["all", "8", "0.1*", "1.6000", "+0.1000", "±", "0.0200", "better"]
    assert "diverged" in lines[5]
    assert summary(found) == (
        "lowest_k is better than all; it makes no difference that matters to mlp; it cannot be told from attention "
        "(8 rows, base 2.0000)."
    )


def test_the_forest_has_zero_and_margin_and_leaves_out_what_diverged() -> None:
    figure = forest_figure(Comparison.model_validate(made()))
    all_, mlp, attention = figure.rows
    assert all_.at is not None
    assert all_.at > figure.zero
    assert mlp.at == figure.zero
    assert figure.low < figure.zero < figure.high
    assert attention.at is None
    panel = rates_panel(Comparison.model_validate(made()))
    assert panel is not None
    assert [line.name for line in panel.lines] == ["lowest_k", "all", "mlp"]
    assert len(panel.lines[0].dots) == 3  # of the first seed alone


@pytest.mark.parametrize(
    "changes",
    [{"arms": []}, {"comparisons": []}, {"base": "a"}, {"schema": "other"}, {"margin": None},
     {"comparisons": [{**made()["comparisons"][0], "verdict": " "}]}, {"arms": [{**made()["arms"][0], "runs": []}]}],
)  # fmt: skip
def test_what_is_no_comparison_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(made(**changes)))
    with pytest.raises(ScoresError, match=r"compare.json"):
        Comparison.from_file(path)
    path.write_text(json.dumps(made()))
    again = Comparison.from_file(path)
    again.to_file(path)
    assert Comparison.from_file(path) == again
