"""Arms have one size and one alpha, whatever they adapt; what cannot be brought to it is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

import plop_dist
from plop_dist.compare.arms import budget_of, build_arms
from plop_dist.config.schema import CompareConfig, PlacementConfig
from plop_dist.errors import ConfigError, UserError
from tests.exporters.cases import projections_of, scores_of
from tests.models import tiny

ARMS = CompareConfig().arms
CONFIG = PlacementConfig(k=2, rank=4, alpha=8)


@pytest.fixture(scope="module")
def scores() -> plop_dist.Scores:
    return scores_of(projections_of(tiny("llama")))


def test_every_arm_meets_the_budget_of_all_at_one_alpha(scores: plop_dist.Scores) -> None:
    arms = build_arms(scores, ARMS, CONFIG, seed=0)
    budget = budget_of(scores, CONFIG)
    assert [arm.name for arm in arms] == ARMS
    assert budget == sum(4 * (m.in_features + m.out_features) for m in scores.modules if m.type != "lm_head")
    for arm in arms:
        one_rank = arm.placement.num_trainable_parameters / arm.placement.rank
        off = arm.placement.num_trainable_parameters - budget
        assert arm.placement.alpha == 8
        assert abs(off) <= max(0.03 * budget, one_rank / 2)
        assert arm.deviation == pytest.approx(off / budget)
    types = {arm.name: set(arm.placement.module_types) for arm in arms}
    assert types["mlp"] | types["attention"] == types["all"]
    assert not types["mlp"] & types["attention"]
    assert len(types["random"]) == len(types["lowest_k"]) == 2
    assert not types["highest_k"] & types["lowest_k"]


def test_random_is_drawn_by_the_seed_from_all_sets(scores: plop_dist.Scores) -> None:
    def drawn(seed: int) -> tuple[str, ...]:
        return build_arms(scores, ["random", "all"], CONFIG, seed)[0].placement.module_types

    assert drawn(3) == drawn(3)
    assert len({drawn(seed) for seed in range(12)}) > 4


def test_under_megatron_ranks_are_multiples_of_tp(scores: plop_dist.Scores) -> None:
    sharded = scores.model_copy(update={"parallel": {"backend": "megatron", "tp": 4}})
    assert {arm.placement.rank % 4 for arm in build_arms(sharded, ARMS, CONFIG, seed=0)} == {0}


def test_a_file_is_an_arm_at_the_rank_that_meets_the_budget(scores: plop_dist.Scores, tmp_path: Path) -> None:
    scores.to_file(tmp_path / "scores.json")
    plop_dist.place(scores, policy="attention", rank=1).to_file(tmp_path / "mine.json")
    mine, same = build_arms(scores, [str(tmp_path / "mine.json"), "attention"], CONFIG, seed=0)
    assert mine.placement.modules == same.placement.modules
    assert (mine.placement.rank, mine.placement.alpha) == (same.placement.rank, same.placement.alpha)
    layers = plop_dist.place(scores, policy="lowest_k", k=3, granularity="module", rank=1)
    layers.to_file(tmp_path / "modules.json")
    few = build_arms(scores, [str(tmp_path / "modules.json"), "all"], PlacementConfig(rank=1), seed=0)[0]
    assert few.placement.modules == layers.modules


@pytest.mark.parametrize(
    ("arms", "options", "message"),
    [
        (["lowest_k"], {}, r"compare.arms is \['lowest_k'\], expected two placements at least"),
        (["all", "all"], {}, "compare.arms names 'all' twice"),
        (["all", "lowest"], {}, r"compare.arms: 'lowest' is no policy and no path of a .json. Did you mean 'lowest_k'"),
        (["all", "budget"], {}, "policy 'budget' sets ranks by itself"),
        (["all", "none.json"], {}, r"compare.arms: none.json: .*does not exist"),
        (["all", "mlp"], {"rank_pattern": {"v_proj": 2}}, "placement.rank_pattern is given"),
        (["all", "lowest_k"], {"k": 1, "rank": 20}, r"compare.arms: lowest_k has .* fewer than all linear types"),
        (["all", "lowest_k"], {"k": 99}, r"compare.arms: lowest_k: placement.k is 99"),
    ],
)
def test_what_is_no_arm_is_refused(
    scores: plop_dist.Scores, arms: list[str], options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_arms(scores, arms, CONFIG.model_copy(update=options), seed=0)


def test_a_placement_of_another_model_is_refused(scores: plop_dist.Scores, tmp_path: Path) -> None:
    other = scores_of(projections_of(tiny("gpt2")))
    other.to_file(tmp_path / "scores.json")
    plop_dist.place(other, k=1, rank=1).to_file(tmp_path / "placement.json")
    with pytest.raises(ConfigError, match="is none of this model's"):
        build_arms(scores, ["all", str(tmp_path / "placement.json")], CONFIG, seed=0)
