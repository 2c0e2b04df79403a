"""placement.match: the rank at which a choice is as large as adapters on every linear type would be."""

from __future__ import annotations

from typing import Any

import pytest

import plop_dist
from plop_dist.errors import ConfigError
from plop_dist.values.scores import Scores
from tests.made_scores import made_scores


def per_rank(scores: Scores, types: tuple[str, ...]) -> int:
    return sum(m.in_features + m.out_features for m in scores.modules if m.type in types)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_rank_is_the_nearest_to_the_size_of_all(k: int) -> None:
    scores = made_scores()
    whole = plop_dist.place(scores, policy="all", rank=4, alpha=8)
    chosen = plop_dist.place(scores, k=k, rank=4, alpha=8, match="all")
    assert whole.alpha == chosen.alpha == 8
    one = per_rank(scores, chosen.module_types)
    assert chosen.num_trainable_parameters == chosen.rank * one
    least = min(abs(rank * one - whole.num_trainable_parameters) for rank in range(1, 4000))
    assert abs(chosen.num_trainable_parameters - whole.num_trainable_parameters) == least
    assert chosen.policy["match"] == "all"
    assert "match" not in plop_dist.place(scores, k=k).policy


def test_of_all_it_is_the_rank_itself() -> None:
    placement = plop_dist.place(made_scores(), policy="all", rank=4, match="all")
    assert placement.rank == 4


def test_under_megatron_it_is_a_multiple_of_tp_and_never_above_the_smallest_side() -> None:
    scores = made_scores()
    sharded = scores.model_copy(update={"parallel": {"backend": "megatron", "tp": 8}})
    plain, cut = (plop_dist.place(given, k=2, rank=4, match="all").rank for given in (scores, sharded))
    assert cut % 8 == 0
    assert abs(cut - plain) <= 4
    highest = plop_dist.place(scores, k=1, rank=2048, match="all")
    assert highest.rank == min(min(m.in_features, m.out_features) for m in highest.chosen)


@pytest.mark.parametrize(
    "options", [{"policy": "budget", "max_trainable_parameters": 10**9}, {"rank_pattern": {"v_proj": 4}}]
)
def test_ranks_that_are_set_otherwise_are_refused_beside_it(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"placement.match is all, but placement.* sets ranks by itself"):
        plop_dist.place(made_scores(), match="all", **options)
