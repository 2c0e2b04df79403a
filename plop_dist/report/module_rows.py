"""The rows of the table of modules: one for each module, or for all of a type in a layer where these are many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from plop_dist.report.spread import MOST_ONE_BY_ONE, Spread, cells, layer_of, spread_of
from plop_dist.values.placement import Placement
from plop_dist.values.scores import ModuleScore, Scores

MOST_ROWS = 4000


@dataclass(frozen=True)
class ModuleRow:
    """One module, or the modules of one type in one layer, then with their means.

    rank: of the adapter on it, or the ranks of those on them; empty where none is.
    """

    name: str
    type: str
    layer: int
    spread: Spread
    shape: str
    num_chosen: int
    rank: str


def module_rows(scores: Scores, placement: Placement | None) -> list[ModuleRow]:
    """Return the rows, lowest NFN first; of more than MOST_ROWS, as many of the lowest and of the highest."""
    chosen = {} if placement is None else {module.fqn: placement.rank_of(module) for module in placement.chosen}
    rows = [_row(name, members, chosen) for name, members in _groups(scores)]
    rows.sort(key=lambda row: (row.spread.nfn, row.name))
    half = MOST_ROWS // 2
    return rows if len(rows) <= MOST_ROWS else [*rows[:half], *rows[-half:]]


def num_rows_left_out(scores: Scores) -> int:
    """Return how many rows in the middle are left out."""
    return max(0, sum(1 for _ in _groups(scores)) - MOST_ROWS)


def _groups(scores: Scores) -> Iterator[tuple[str, Sequence[ModuleScore]]]:
    for members in cells(scores).values():
        if len(members) > MOST_ONE_BY_ONE:
            yield f"{len(members):,} modules", members
        else:
            yield from ((module.fqn, [module]) for module in members)


def _row(name: str, members: Sequence[ModuleScore], chosen: dict[str, int]) -> ModuleRow:
    ranks = [chosen[module.fqn] for module in members if module.fqn in chosen]
    shapes = sorted({(module.in_features, module.out_features) for module in members})
    distinct = sorted(set(ranks))
    return ModuleRow(
        name=name,
        type=members[0].type,
        layer=layer_of(members[0]),
        spread=spread_of(members),
        shape=f"{shapes[0][0]:,} → {shapes[0][1]:,}" if len(shapes) == 1 else f"{len(shapes)} shapes",
        num_chosen=len(ranks),
        rank="" if not ranks else f"{distinct[0]}" if len(distinct) == 1 else f"{distinct[0]} to {distinct[-1]}",
    )
