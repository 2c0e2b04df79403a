"""Which placements a configuration can come to, before anything is scored: every order of the types is possible."""

# U units, b rows of values

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from plop_dist.choose.decision import Decision, decide
from plop_dist.choose.place import placement_with
from plop_dist.config.schema import PlacementConfig
from plop_dist.values.placement import Placement
from plop_dist.values.scores import SCORES_SCHEMA, DataInfo, ModelInfo, ModuleScore, Projection, Scores, TypeScore

_NUM_ORDERS = 400  # of 7 types every three are found
_MOST_PLACEMENTS = 60
_MOST_MODULES = 200_000  # of all placements together, which are looked at one by one
_LOWEST, _HIGHEST = 0.8, 2.8  # what NFNs of real models lie between


@dataclass(frozen=True, eq=False)
class Possible:
    """The units to choose between, and different choices among them, each as a placement.

    is_every: whether these are all choices there are; False where there may be more than were looked at.
    """

    num_units: int
    placements: tuple[Placement, ...]
    is_every: bool

    @property
    def parameters(self) -> tuple[int, int]:
        """The fewest and the most trainable parameters among them."""
        counts = [placement.num_trainable_parameters for placement in self.placements]
        return min(counts), max(counts)


def possible_placements(projections: Sequence[Projection], config: PlacementConfig, model: ModelInfo) -> Possible:
    """Return what the policy can choose when it gets scores of these projections.

    Raises PlacementError as `place` will: more is asked for than there are candidates, a name matches no module, ranks
    exceed sizes.
    """
    decision = decide(_scores(projections, model), config)
    rows_bU = np.unique(decision.rule(_orders(len(decision.candidates.units))), axis=0)
    rows_bU = rows_bU[rows_bU.any(axis=1)]
    if not len(rows_bU):
        rows_bU = decision.chosen_U[None]  # which placement_with refuses, with what to change
    most = max(2, min(_MOST_PLACEMENTS, _MOST_MODULES // max(1, len(projections))))
    # Evenly spread where there are too many, so that every unit is in one of them.
    taken = rows_bU[np.unique(np.linspace(0, len(rows_bU) - 1, min(most, len(rows_bU))).astype(int))]
    placements = tuple(_placements(decision, taken))
    return Possible(len(decision.candidates.units), placements, len(taken) == len(rows_bU))


def _placements(decision: Decision, rows_bU: np.ndarray) -> Iterator[Placement]:
    for chosen_U in rows_bU:
        yield placement_with(decision, chosen_U)


def _orders(num_units: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = np.linspace(_LOWEST, _HIGHEST, num_units)
    return np.stack([rng.permutation(values) for _ in range(_NUM_ORDERS)])


def _scores(projections: Sequence[Projection], model: ModelInfo) -> Scores:
    names = list(dict.fromkeys(item.type for item in projections))
    nfn = dict(zip(names, np.linspace(_LOWEST, _HIGHEST, len(names)).tolist(), strict=True))
    modules = tuple(
        ModuleScore(**item.model_dump(), num_tokens=1, gain=nfn[item.type], baseline=1.0, nfn=nfn[item.type])
        for item in projections
    )
    counts = {name: sum(item.type == name for item in projections) for name in names}
    return Scores(
        schema=SCORES_SCHEMA,
        model=model,
        data=DataInfo(),
        estimator={},
        parallel={},
        modules=modules,
        types=tuple(TypeScore(type=name, num_modules=counts[name], nfn=nfn[name]) for name in names),
    )
