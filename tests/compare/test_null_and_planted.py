"""What real trainings say where there is nothing to find, and where there is much."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import plop_dist
from plop_dist.compare.arms import Candidate
from plop_dist.compare.resampling import compare_losses
from plop_dist.compare.runs import Record, Runs
from plop_dist.compare.summing_up import Trained, sum_up
from plop_dist.compare.verdict import verdict_of
from plop_dist.config.schema import Config
from plop_dist.values.placement import Placement
from tests.compare.test_compare import make_config, scored

NUM_SEEDS = 12


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Runs, Callable[[Placement, int], Record]]:
    """Return a configuration, its runs, and what trains a placement from a seed at the one rate."""
    config = scored(make_config(tmp_path_factory.mktemp("case"), "run", {"held_out": 20, "seeds": 3}))
    train = config.train.model_copy(
        update={"max_steps": 12, "eval_samples": 20, "learning_rate": 0.01, "prompt_template": None}
    )
    config = config.model_copy(update={"train": train})
    runs = Runs(config, lambda entry: None)

    def trained(placement: Placement, seed: int) -> Record:
        at_seed = config.model_copy(update={"train": train.model_copy(update={"seed": seed})})
        return runs.train(at_seed, placement, None)

    return config, runs, trained


@pytest.mark.slow
def test_one_arm_s_trainings_under_two_names_are_seldom_told_apart(
    case: tuple[Config, Runs, Callable[[Placement, int], Record]],
) -> None:
    """Its trainings are dealt to two names, and its held-out rows drawn anew: one time in twenty at the 5% level."""
    config, runs, trained = case
    placement = plop_dist.place(plop_dist.Scores.from_file(config.run_path / "scores.json"), k=2, rank=4, alpha=8)
    stored_SR = np.array([trained(placement, seed).reported for seed in range(NUM_SEEDS)])
    targets_R = runs.method.targets_R[1::2]
    assert stored_SR.std(axis=0).min() > 0  # a seed does make a difference
    finds = []
    for draw in range(200):
        rng = np.random.default_rng(draw)
        seeds, rows = rng.permutation(NUM_SEEDS), rng.integers(0, len(targets_R), len(targets_R))
        first_SR, other_SR = stored_SR[seeds[:3]][:, rows], stored_SR[seeds[3:6]][:, rows]
        paired = compare_losses(first_SR, other_SR, targets_R[rows], draw)
        finds.append(verdict_of(paired, paired.p_value, 0.02, len(rows), 3) in ("better", "worse"))
    assert sum(finds[:20]) <= 2
    assert sum(finds) <= 20


@pytest.mark.slow
def test_rank_64_everywhere_is_better_than_rank_1_on_one_type(
    case: tuple[Config, Runs, Callable[[Placement, int], Record]],
) -> None:
    config, runs, trained = case
    scores = plop_dist.Scores.from_file(config.run_path / "scores.json")
    large = plop_dist.place(scores, policy="all", rank=64, alpha=8)
    small = plop_dist.place(scores, k=1, rank=1, alpha=8)
    base = runs.measure_base(large)
    arms = []
    for name, placement in (("large", large), ("small", small)):
        records = [trained(placement, seed) for seed in range(3)]
        candidate = Candidate(name, placement, deviation=0.0)
        arms.append((candidate, Trained(candidate, by_rate={0: records[0]}, by_seed=records)))
    found = sum_up(config, scores, arms, runs.method, base.values)
    large_arm, small_arm = found.arms
    assert large_arm.value is not None
    assert small_arm.value is not None
    assert large_arm.value < small_arm.value < found.base
    (against,) = found.comparisons
    assert against.difference == pytest.approx(small_arm.value - large_arm.value)
    assert against.verdict == "better"
    (turned,) = sum_up(config, scores, arms[::-1], runs.method, base.values).comparisons
    assert turned.verdict == "worse"
