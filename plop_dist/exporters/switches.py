"""What a target adapts that only has switches for parts of a model: the MLP, attention, the head, in every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from plop_dist.errors import ExportError
from plop_dist.exporters.exporter import Adapted
from plop_dist.exporters.holders import adapted, known_projections
from plop_dist.exporters.leaving_out import excluding
from plop_dist.exporters.names_read import found_by
from plop_dist.exporters.refusals import refuse_towers
from plop_dist.values.names import natural_key
from plop_dist.values.placement import Placement

Switches = Mapping[str, Sequence[str]]  # a switch -> the types that it adapts, in every layer
MLP = ("gate_proj", "up_proj", "down_proj")


def switched(
    placement: Placement, target: str, switches: Switches, widen: bool
) -> tuple[dict[str, bool], tuple[str, ...], tuple[str, ...]]:
    """Return which switches are on, what they adapt beyond the placement, and notes.

    Raises ExportError for types without a switch, and, unless `widen`, for a switch that adapts more than is chosen.
    """
    refuse_towers(placement, target)
    chosen, notes = adapted(placement)
    known = known_projections(placement)
    types = list(dict.fromkeys(module.type for module in placement.chosen))
    every = [type_ for group in switches.values() for type_ in group]
    unknown = [type_ for type_ in types if type_ not in every]
    if unknown:
        raise ExportError(
            f"{target} cannot adapt {', '.join(unknown)}: it knows {', '.join(every)}. Nearest choice: the placement "
            f"without ({excluding(placement, unknown)}), or export to peft.",
            unknown,
        )
    on = {name: any(type_ in types for type_ in group) for name, group in switches.items()}
    widened = []
    for name, group in switches.items():
        absent = [item for item in known if on[name] and item.type in group and item.fqn not in chosen]
        if not absent:
            continue
        beside = sorted({item.type for item in absent} - set(types), key=natural_key)
        wanted = [type_ for type_ in types if type_ in group]
        more = f"{', '.join(beside)} as well as" if beside else "every layer of"
        if not widen:
            raise ExportError(
                f"{target} cannot adapt {', '.join(wanted)} as chosen: {name} takes {', '.join(group)} in every layer, "
                f"and the placement leaves out {absent[0].fqn} (and {len(absent) - 1} more). Nearest choice: {more} "
                f"{', '.join(wanted)} (--widen), or none of them ({excluding(placement, wanted)}).",
                wanted,
            )
        widened.append(f"{name} adapts {more} {', '.join(wanted)}: {len(absent)} modules more.")
    return on, tuple(widened), notes


def read_switches(placement: Placement, rank: int, switches: Switches, on: Sequence[str]) -> Adapted:
    """Return what these switches adapt at this rank."""
    types = [type_ for name in on for type_ in switches[name]]
    return found_by(placement, rank, types, lambda name, item: item.type == name)
