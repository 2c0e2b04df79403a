"""How an existing configuration of adapters differs from a placement, in modules and in trainable parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from plop_dist.exporters.exporter import Adapted
from plop_dist.exporters.holders import known_projections
from plop_dist.exporters.peft_read import adapted_by_peft
from plop_dist.values.adapter_size import num_trainable_parameters
from plop_dist.values.names import natural_key
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Projection


@dataclass(frozen=True)
class Difference:
    """Logical projections that only the placement, only the configuration, or both adapt, each in natural order.

    Parameters are trainable ones: the placement's and the configuration's in all, each at its own ranks, and those of
    the three parts (`both` at the placement's ranks). unmatched: names in the configuration that match no module of the
    scored model; uncounted: its fields that train more than A and B.
    """

    only_placement: tuple[str, ...]
    only_config: tuple[str, ...]
    both: tuple[str, ...]
    num_parameters_placement: int
    num_parameters_config: int
    num_parameters_only_placement: int
    num_parameters_only_config: int
    num_parameters_both: int
    rank_placement: int
    rank_config: int
    types: tuple[tuple[str, int, int, int], ...]
    unmatched: tuple[str, ...] = ()
    uncounted: tuple[str, ...] = ()

    @property
    def is_same(self) -> bool:
        """Whether both train the same projections with the same number of parameters, and nothing else."""
        same_modules = not self.only_placement and not self.only_config and not self.uncounted
        return same_modules and self.num_parameters_placement == self.num_parameters_config

    def rows(self) -> list[tuple[str, int, int, int]]:
        """Return (type, modules in both, only in the placement, only in the configuration), for a table."""
        return list(self.types)

    def lines(self) -> list[str]:
        """Return the difference as plain text lines."""
        width = max((len(name) for name, *_ in self.types), default=4)
        text = [f"{'type':<{width}}  {'both':>6}  {'placement only':>14}  {'config only':>11}"]
        text += [f"{name:<{width}}  {both:>6}  {ours:>14}  {theirs:>11}" for name, both, ours, theirs in self.types]
        text.append(
            f"placement: {len(self.both) + len(self.only_placement)} modules, rank {self.rank_placement}, "
            f"{self.num_parameters_placement:,} trainable parameters"
        )
        text.append(
            f"config:    {len(self.both) + len(self.only_config)} modules, rank {self.rank_config}, "
            f"{self.num_parameters_config:,} trainable parameters"
        )
        if self.unmatched:
            text.append(f"names in the config that match no scored module: {', '.join(self.unmatched)}")
        if not self.both and not self.only_config:
            text.append("the config adapts no scored module: PEFT refuses it unless it names others (embeddings)")
        if self.uncounted:
            text.append(f"trained beside A and B under the config, and not counted: {', '.join(self.uncounted)}")
        if self.is_same:
            text.append("no difference")
        return text


def diff(placement: Placement, adapter_config: Mapping[str, Any], where: str = "adapter_config") -> Difference:
    """Return how a PEFT LoRA configuration differs from the placement. where: the file, for messages.

    Raises ConfigError if it is not one, one that PEFT refuses for this model, or one whose patterns cannot be matched
    in a few seconds.
    """
    return difference(placement, adapted_by_peft(adapter_config, placement, where))


def difference(placement: Placement, theirs: Adapted) -> Difference:
    """Return how what a file adapts (read_back.read_export) differs from the placement."""
    known = known_projections(placement)
    ours = set(placement.modules)
    their_items = theirs.items(known)
    their_paths = {item.fqn for item in their_items}
    our_items = [item for item in known if item.fqn in ours]
    return Difference(
        only_placement=_ordered(ours - their_paths),
        only_config=_ordered(their_paths - ours),
        both=_ordered(ours & their_paths),
        num_parameters_placement=placement.num_trainable_parameters,
        num_parameters_config=_count(their_items, theirs.ranks),
        num_parameters_only_placement=num_trainable_parameters(
            (i for i in our_items if i.fqn not in their_paths), placement.rank_of
        ),
        num_parameters_only_config=_count((i for i in their_items if i.fqn not in ours), theirs.ranks),
        num_parameters_both=num_trainable_parameters((i for i in our_items if i.fqn in their_paths), placement.rank_of),
        rank_placement=placement.rank,
        rank_config=theirs.rank,
        types=_rows(known, ours, their_paths),
        unmatched=theirs.unmatched,
        uncounted=theirs.uncounted,
    )


def _rows(known: Collection[Projection], ours: set[str], theirs: set[str]) -> tuple[tuple[str, int, int, int], ...]:
    counts = Counter((item.type, item.fqn in ours, item.fqn in theirs) for item in known)
    rows = (
        (name, counts[name, True, True], counts[name, True, False], counts[name, False, True])
        for name in dict.fromkeys(item.type for item in known)
    )
    return tuple(row for row in rows if any(row[1:]))


def _count(items: Iterable[Projection], ranks: Mapping[str, int]) -> int:
    return num_trainable_parameters(items, lambda item: ranks[item.fqn])


def _ordered(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(paths, key=natural_key))
