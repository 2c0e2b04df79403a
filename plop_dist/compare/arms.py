"""Which placements are compared: one budget of parameters, each arm at the rank that comes nearest, one alpha."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plop_dist.choose.decision import decide
from plop_dist.choose.matching import nearest_rank, rank_step
from plop_dist.choose.place import place, placement_with
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import ConfigError, PlopError, suggest
from plop_dist.registry import POLICIES, load, names
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Scores

RANDOM = "random"
_MOST_DEVIATION = 0.03


@dataclass(frozen=True)
class Candidate:
    """An arm before it is trained: its placement at the budget, and by which share it misses that."""

    name: str
    placement: Placement
    deviation: float


def check_arms(arms: Sequence[str], config: PlacementConfig) -> None:
    """Raise ConfigError for arms that are no placements, or cannot be brought to one budget."""
    if len(arms) < 2:
        raise ConfigError(f"compare.arms is {list(arms)}, expected two placements at least, e.g. [lowest_k, all].")
    twice = next((name for name in arms if arms.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"compare.arms names '{twice}' twice; leave one of them out.")
    if config.rank_pattern:
        raise ConfigError(
            "placement.rank_pattern is given, but every arm takes the one rank that meets the budget; leave it out."
        )
    for name in arms:
        if name == RANDOM or name.endswith(".json"):
            continue
        known = (*names(POLICIES), RANDOM)
        if name not in known:
            raise ConfigError(f"compare.arms: '{name}' is no policy and no path of a .json. {suggest(name, known)}")
        if load(POLICIES, name).sets_rank:
            raise ConfigError(f"compare.arms: policy '{name}' sets ranks by itself, and cannot meet the budget of all.")


def budget_of(scores: Scores, config: PlacementConfig) -> int:
    """Return the trainable parameters of all linear types at placement.rank."""
    whole = {"policy": "all", "granularity": "type", "options": {}, "match": None}
    return place(scores, config.model_copy(update=whole)).num_trainable_parameters


def build_arms(scores: Scores, arms: Sequence[str], config: PlacementConfig, seed: int) -> list[Candidate]:
    """Return the arms in their order. Deterministic; needs no model.

    Raises ConfigError as check_arms does, and for an arm that misses the budget by more than 3% and half a step of its
    rank; PlacementError, ScoresError for what cannot be placed or read.
    """
    check_arms(arms, config)
    budget = budget_of(scores, config)
    found = []
    for name in arms:
        try:
            placement = _placement_of(name, scores, config, seed)
        except PlopError as error:
            raise type(error)(f"compare.arms: {name}: {error}") from error
        deviation = placement.num_trainable_parameters / budget - 1
        # Parameters grow with the rank in proportion; under Megatron a step of it is tp.
        step = placement.num_trainable_parameters / placement.rank * rank_step(scores)
        if abs(deviation) * budget > max(_MOST_DEVIATION * budget, 0.5 * step):
            raise ConfigError(
                f"compare.arms: {name} has {placement.num_trainable_parameters:,} parameters at rank {placement.rank}, "
                f"the highest of its weights, {-deviation:.0%} fewer than all linear types at placement.rank "
                f"{config.rank} ({budget:,}); lower placement.rank, or leave the arm out."
            )
        found.append(Candidate(name, placement, deviation))
    return found


def _placement_of(name: str, scores: Scores, config: PlacementConfig, seed: int) -> Placement:
    if name == RANDOM:
        return _random(scores, config, seed)
    if name.endswith(".json"):
        return _of_file(Path(name), scores, config)
    update: dict[str, Any] = {"policy": name, "match": "all"}
    policy = load(POLICIES, name)
    if "k" not in policy.parameters:  # whole blocks are whole, however finely others choose
        update["granularity"] = "type"
    if name != config.policy:
        update["options"] = {}
    return place(scores, config.model_copy(update=update))


def _random(scores: Scores, config: PlacementConfig, seed: int) -> Placement:
    """Return as many units as placement.k, drawn by the seed from those that lowest_k chooses between."""
    decision = decide(scores, config.model_copy(update={"policy": "lowest_k", "match": "all", "options": {}}))
    chosen_U = np.zeros_like(decision.chosen_U)
    chosen_U[random.Random(seed).sample(range(len(chosen_U)), int(decision.chosen_U.sum()))] = True
    return placement_with(decision, chosen_U)


def _of_file(path: Path, scores: Scores, config: PlacementConfig) -> Placement:
    given = Placement.from_file(path)
    known = {module.fqn for module in scores.modules}
    foreign = next((fqn for fqn in given.modules if fqn not in known), None)
    if foreign is not None:
        raise ConfigError(f"its module '{foreign}' is none of this model's; it is a placement of another one.")
    if given.rank_pattern:
        raise ConfigError("it has a rank_pattern, but every arm takes the one rank that meets the budget.")
    # As `all` among these modules: a path names itself.
    among = config.model_copy(
        update={"policy": "all", "granularity": "module", "options": {}, "match": None, "include": list(given.modules),
                "exclude": [], "experts": True}
    )  # fmt: skip
    decision = decide(scores, among)
    rank = nearest_rank(decision, decision.chosen_U, budget_of(scores, config))
    at_rank = decide(scores, among.model_copy(update={"rank": rank}))
    return placement_with(at_rank, at_rank.chosen_U)
