"""Whether two runs choose differently, and how sure that is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

import plop_dist
from plop_dist.choose.decision import resolve_policy
from plop_dist.choose.two_runs import compare_runs
from plop_dist.errors import ScoresError
from plop_dist.values.scores import Scores
from tests.cli.cases import assert_one_message
from tests.cli.cases import plop_dist as command
from tests.made_scores import made_scores


def scaled(scores: Scores, factors: dict[str, float]) -> Scores:
    """Return scores in which every NFN of a type, and each sample's sums, are so many times as large."""
    by_fqn = {module.fqn: factors.get(module.type, 1.0) for module in scores.modules}
    modules = tuple(
        module.model_copy(update={"nfn": module.nfn * by_fqn[module.fqn], "gain": module.gain * by_fqn[module.fqn]})
        for module in scores.modules
    )
    types = sorted(
        (entry.model_copy(update={"nfn": entry.nfn * factors.get(entry.type, 1.0)}) for entry in scores.types),
        key=lambda entry: entry.nfn,
    )
    samples = scores.samples
    assert samples is not None
    weights = np.array([by_fqn.get(fqn, 1.0) for fqn in samples.fqns])[:, None]
    changed = dataclasses.replace(samples, gain_total=samples.gain_total * weights)
    return scores.model_copy(update={"modules": modules, "types": tuple(types)}).with_samples(changed)


@pytest.fixture(scope="module")
def scores() -> Scores:
    return made_scores(num_layers=4, num_experts=4, num_samples=30)


def test_a_run_and_itself_choose_the_same(scores: Scores) -> None:
    found = compare_runs(scores, scores, resolve_policy(k=2))
    assert found.is_same
    assert found.both == tuple(sorted(plop_dist.place(scores, k=2).module_types))
    assert (found.probability_of_same, found.spearman) == (1.0, pytest.approx(1.0))


def test_another_order_of_types_is_another_choice(scores: Scores) -> None:
    lowest, *_, highest = (entry.type for entry in scores.types if entry.type != "lm_head")
    other = scaled(scores, {lowest: 50.0, highest: 0.01})
    found = compare_runs(scores, other, resolve_policy(k=1))
    first, second = (plop_dist.place(one, k=1).module_types for one in (scores, other))
    assert (found.only_first, found.only_second, found.both) == (first, second, ())
    assert found.probability_of_same == 0.0
    pairs = [(one.nfn, two.nfn) for one, two in zip(scores.modules, other.modules, strict=True)]
    assert found.spearman == pytest.approx(spearmanr(*np.array(pairs).T).statistic)
    assert f"another choice: {first[0]} in the first run alone; {second[0]} in the second run alone" in found.lines()


def test_models_without_a_common_module_are_not_compared(scores: Scores) -> None:
    renamed = tuple(module.model_copy(update={"fqn": f"other.{module.fqn}"}) for module in scores.modules)
    with pytest.raises(ScoresError, match="no module in common"):
        compare_runs(scores, scores.model_copy(update={"modules": renamed}), resolve_policy())


def test_two_run_directories_on_the_command_line(scores: Scores, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        scores.to_file(tmp_path / name / "scores.json")
    assert command("place", tmp_path / "a", "k=2").status == 0
    shown = command("diff", tmp_path / "a", tmp_path / "b")
    assert (shown.status, "the same choice: " in shown.out) == (0, True), shown.err
    told = json.loads(command("diff", tmp_path / "a", tmp_path / "b", "--json").out)
    assert (told["schema"], told["is_same"], len(told["both"])) == ("plop-dist/diff-runs/1", True, 2)
    (tmp_path / "b" / "scores.json").write_text("{")
    assert_one_message(command("diff", tmp_path / "a", tmp_path / "b"), "scores.json is not whole JSON")
