"""Ranks that share weights stay on one node wherever that can be."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from plop_dist.launch.rank_places import find_places


@pytest.mark.parametrize(
    ("rooms", "world_size", "group_size", "torn"),
    [
        ({"a": 4, "b": 6, "c": 4}, 8, 4, 0),
        ({"a": 1, "b": 8, "c": 1}, 8, 4, 0),
        ({"a": 3, "b": 3}, 6, 2, 1),
        ({"a": 3, "b": 2, "c": 3}, 8, 2, 1),
        ({"a": 2, "b": 2}, 4, 4, 1),
        ({"a": 0, "b": 5}, 5, 1, 0),
    ],
)
def test_as_few_groups_are_torn_as_can_be(rooms: dict[str, int], world_size: int, group_size: int, torn: int) -> None:
    for order in itertools.permutations(rooms.items()):
        found = find_places(dict(order), world_size, group_size)
        assert found is not None
        assert len(found.nodes) == world_size
        assert len(found.torn) == torn, order
        counts = Counter(found.nodes)
        assert all(counts[node] <= rooms[node] for node in counts)
        runs = [node for node, _ in itertools.groupby(found.nodes)]
        assert len(runs) == len(set(runs)), "the ranks of one node do not follow each other, as Ray Train gives them"


def test_whole_groups_take_few_nodes_and_leave_large_ones_free() -> None:
    found = find_places({"a": 8, "b": 2, "c": 4}, 4, 2)
    assert found is not None
    assert set(found.nodes) == {"c"}


def test_what_does_not_fit_has_no_places() -> None:
    assert find_places({"a": 1, "b": 1}, 3, 1) is None
    assert find_places({}, 1, 1) is None
