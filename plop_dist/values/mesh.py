"""How ranks are laid out over the mesh axes: sizes, coordinates, groups. Integers only.

The order is Megatron's (`tp-cp-ep-dp-pp`, megatron/core/parallel_state.py): tp changes fastest, pp slowest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plop_dist.errors import LayoutError

AXES = ("tp", "cp", "dp", "pp")  # from the fastest-changing to the slowest


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes. `ep` lives inside tp * cp * dp and adds no ranks."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp * self.cp

    @property
    def product_text(self) -> str:
        """The product that gives the world size, with field names, for error messages."""
        sizes = {"tp": self.tp, "pp": self.pp, "dp": self.dp, "cp": self.cp}
        shown = {axis: size for axis, size in sizes.items() if size > 1 or axis in ("tp", "pp", "dp")}
        return " * ".join(f"parallel.{axis} ({size})" for axis, size in shown.items())

    def validate(self) -> None:
        """Raise LayoutError if the axes contradict each other."""
        ranks_per_stage = self.tp * self.cp * self.dp
        if ranks_per_stage % self.ep:
            fitting = ", ".join(map(str, divisors(ranks_per_stage)))
            raise LayoutError(
                f"parallel.ep ({self.ep}) does not divide parallel.tp * cp * dp ({ranks_per_stage}); "
                f"use one of {fitting}."
            )

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the rank's index on each axis.

        >>> Layout(tp=2, pp=2).coordinates(3)
        {'tp': 1, 'cp': 0, 'dp': 0, 'pp': 1}
        """
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank {rank} is outside the layout's {self.world_size} ranks.")
        found = {}
        for axis in AXES:
            size = getattr(self, axis)
            found[axis] = rank % size
            rank //= size
        return found

    def groups(self, axis: str) -> list[list[int]]:
        """Return the lists of ranks that differ only in `axis`, each in order of that axis.

        >>> Layout(tp=2, pp=2).groups("pp")
        [[0, 2], [1, 3]]
        """
        by_rest: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            at = self.coordinates(rank)
            by_rest.setdefault(tuple(at[other] for other in AXES if other != axis), []).append(rank)
        return list(by_rest.values())


def divisors(number: int) -> list[int]:
    """Return the positive divisors in ascending order.

    >>> divisors(9)
    [1, 3, 9]
    """
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def nearest(wanted: int, candidates: Sequence[int]) -> list[int]:
    """Return the candidates next to `wanted`: the largest below it and the smallest above it.

    >>> nearest(4, [1, 3, 9])
    [3, 9]
    """
    below = [candidate for candidate in candidates if candidate <= wanted]
    above = [candidate for candidate in candidates if candidate > wanted]
    return ([max(below)] if below else []) + ([min(above)] if above else [])


def share(total: int, size: int, index: int) -> range:
    """Return the contiguous part of `total` items that member `index` of `size` owns; sizes differ by one at most."""
    base, extra = divmod(total, size)
    start = index * base + min(index, extra)
    return range(start, start + base + (1 if index < extra else 0))
