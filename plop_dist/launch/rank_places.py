"""Which rank runs on which node: groups that share weights stay together wherever that can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Places:
    """The node of each rank, in the order of ranks, and the groups whose ranks are on several nodes."""

    nodes: tuple[str, ...]
    torn: tuple[int, ...]


def find_places(rooms: Mapping[str, int], world_size: int, group_size: int) -> Places | None:
    """Return where `world_size` ranks run, or None where they do not fit.

    rooms: how many ranks each node takes. group_size: ranks r * group_size up to (r + 1) * group_size - 1 share
    weights. The ranks of one node follow each other, as few nodes are used as whole groups allow, and where groups do
    not all fit whole, few are torn.

    >>> find_places({"a": 4, "b": 6, "c": 4}, 8, 4).nodes
    ('a', 'a', 'a', 'a', 'c', 'c', 'c', 'c')
    >>> find_places({"a": 3, "b": 3}, 6, 2).torn
    (1,)
    """
    if sum(room // group_size for room in rooms.values()) * group_size >= world_size:
        taken = _whole(rooms, world_size, group_size)
    elif sum(rooms.values()) >= world_size:
        taken = _torn(rooms, world_size, group_size)
    else:
        return None
    nodes = tuple(node for node, count in taken for _ in range(count))
    groups = [nodes[start : start + group_size] for start in range(0, world_size, group_size)]
    return Places(nodes, tuple(number for number, group in enumerate(groups) if len(set(group)) > 1))


def _whole(rooms: Mapping[str, int], world_size: int, group_size: int) -> list[tuple[str, int]]:
    """Take whole groups: the node that takes the most of them, and of several such the one with the least room."""
    left, taken, groups = dict(rooms), [], world_size // group_size
    while groups:
        most = min(groups, max(room // group_size for room in left.values()))
        node = min((name for name, room in left.items() if room // group_size >= most), key=lambda name: left[name])
        taken.append((node, most * group_size))
        groups -= most
        del left[node]
    return taken


def _torn(rooms: Mapping[str, int], world_size: int, group_size: int) -> list[tuple[str, int]]:
    """Fill nodes one after another, such first that end with a group's end."""
    left, taken, filled = {name: room for name, room in rooms.items() if room}, [], 0
    while filled < world_size:
        node = min(left, key=lambda name: ((filled + left[name]) % group_size != 0, -left[name]))
        count = min(left.pop(node), world_size - filled)
        taken.append((node, count))
        filled += count
    return taken
