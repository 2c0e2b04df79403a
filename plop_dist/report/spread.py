"""The NFNs of many modules as a person can read them: how they spread, and which modules lie at the ends."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plop_dist.choose.place import ordered_types
from plop_dist.values.scores import ModuleScore, Scores

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MOST_ONE_BY_ONE = 4


@dataclass(frozen=True)
class Spread:
    """How the NFN spreads over some modules: their mean, the quantiles of QUANTILES, and the two at the ends.

    gain and baseline are means too; num_tokens is the sum over the modules.
    """

    num_modules: int
    num_tokens: int
    nfn: float
    gain: float
    baseline: float
    quantiles: tuple[float, ...]
    lowest: ModuleScore
    highest: ModuleScore


@dataclass(frozen=True)
class FoldedType:
    """A type with many modules in a layer, as routed experts are: all of them, each layer's, and those without a score.

    by_layer: -1 stands for what lies outside of all layers.
    """

    type: str
    overall: Spread
    by_layer: dict[int, Spread]
    num_left_out: int


def spread_of(modules: Sequence[ModuleScore]) -> Spread:
    """Return how the NFN spreads over these modules, one at least."""
    nfn = np.array([module.nfn for module in modules])
    return Spread(
        num_modules=len(modules),
        num_tokens=sum(module.num_tokens for module in modules),
        nfn=float(nfn.mean()),
        gain=sum(module.gain for module in modules) / len(modules),
        baseline=sum(module.baseline for module in modules) / len(modules),
        quantiles=tuple(np.quantile(nfn, QUANTILES).tolist()),
        lowest=modules[int(nfn.argmin())],
        highest=modules[int(nfn.argmax())],
    )


def layer_of(module: ModuleScore) -> int:
    """Return the module's layer, -1 outside of all layers."""
    return -1 if module.layer is None else module.layer


def cells(scores: Scores) -> dict[tuple[str, int], list[ModuleScore]]:
    """Return the modules of each type in each layer (-1: outside of all layers)."""
    found: dict[tuple[str, int], list[ModuleScore]] = defaultdict(list)
    for module in scores.modules:
        found[module.type, layer_of(module)].append(module)
    return dict(found)


def folded_types(scores: Scores) -> list[FoldedType]:
    """Return the types with more modules in a layer than a person looks at one by one, lowest NFN first."""
    by_type: dict[str, dict[int, list[ModuleScore]]] = defaultdict(dict)
    for (name, layer), modules in cells(scores).items():
        by_type[name][layer] = modules
    left_out = Counter(projection.type for projection in scores.left_out)
    return [
        FoldedType(
            type=name,
            overall=spread_of([module for modules in by_type[name].values() for module in modules]),
            by_layer={layer: spread_of(modules) for layer, modules in sorted(by_type[name].items())},
            num_left_out=left_out[name],
        )
        for name in ordered_types(scores)
        if max(map(len, by_type[name].values())) > MOST_ONE_BY_ONE
    ]
