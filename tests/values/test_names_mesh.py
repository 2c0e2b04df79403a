"""What a path says and how ranks are laid out: integers and strings, no process group."""

from __future__ import annotations

import doctest
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plop_dist import errors
from plop_dist.errors import LayoutError
from plop_dist.values import mesh, names
from plop_dist.values.mesh import Layout, divisors, nearest, share
from plop_dist.values.names import (
    NameList,
    common_prefix,
    expert_index,
    layer_index,
    module_type,
    natural_key,
    path_matches,
)


@pytest.mark.parametrize("module", [errors, mesh, names])
def test_examples_in_docstrings(module: object) -> None:
    results = doctest.testmod(module)  # type: ignore[arg-type]
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize(
    ("fqn", "type_", "layer"),
    [
        ("model.layers.10.mlp.gate_up_proj", "gate_up_proj", 10),
        ("lm_head", "lm_head", None),
        ("model.layers.2.mlp.shared_experts.down_proj", "down_proj", 2),
        ("model.layers.2.mlp.experts.0.down_proj", "experts.down_proj", 2),
        ("transformer.h.3.attn.c_proj", "c_proj", 3),
    ],
)
def test_type_and_layer(fqn: str, type_: str, layer: int | None) -> None:
    assert (module_type(fqn), layer_index(fqn)) == (type_, layer)


@pytest.mark.parametrize(
    ("fqn", "pattern", "matches"),
    [
        ("model.layers.1.mlp.up_proj", "layers.1.mlp.up_proj", True),
        ("model.layers.11.mlp.up_proj", "layers.1.mlp.up_proj", False),
        ("model.layers.11.mlp.up_proj", "1.mlp.up_proj", False),
        ("model.layers.1.mlp.up_proj", "layers.1.*", True),
        ("model.layers.10.mlp.up_proj", "layers.1.*", False),
        ("model.layers.1.mlp.upXproj", "up.proj", False),
        ("model.layers.1.mlp.up_proj", "*proj", True),
        ("lm_head", "lm_head", True),
        ("my_lm_head", "lm_head", False),
    ],
)
def test_patterns_never_match_a_part_of_a_component(fqn: str, pattern: str, matches: bool) -> None:
    assert path_matches(fqn, pattern) is matches


def test_many_stars_are_matched_in_one_walk() -> None:
    assert path_matches("layers.1.mlp.up_proj", "*l*a*.1.*_proj")
    started = time.process_time()
    assert not path_matches("a" * 400, "*a" * 40 + "*b")
    assert time.process_time() - started < 1


@settings(max_examples=300, deadline=None)
@given(
    entries=st.lists(st.text("ab.*", min_size=1, max_size=5), max_size=5),
    fqn=st.text("ab.", min_size=1, max_size=8),
    own_type=st.sampled_from(["a", "b", "a.b"]),
)
def test_a_list_of_names_finds_what_each_entry_by_itself_does(entries: list[str], fqn: str, own_type: str) -> None:
    naming = [entry for entry in entries if entry == own_type or path_matches(fqn, entry)]
    names = NameList(entries)
    assert names.first(own_type, fqn) == (naming[0] if naming else None)
    assert names.all(own_type, fqn) == set(naming)


def test_what_looks_like_a_number_is_none() -> None:
    long = "9" * 5000
    assert layer_index(f"h.{long}.x") is None
    assert layer_index("h.\u00b2.x") is None
    assert expert_index(f"experts.{long}.x") is None
    assert sorted([f"h.{long}.x", "h.2.x", "h.\u00b2.x"], key=natural_key) == ["h.2.x", f"h.{long}.x", "h.\u00b2.x"]


def test_natural_order_and_prefix() -> None:
    paths = [f"model.layers.{layer}.mlp.up_proj" for layer in (10, 2, 1)]
    assert sorted(paths, key=natural_key) == [paths[2], paths[1], paths[0]]
    assert sorted(["a.b", "a.1", "a"], key=natural_key) == ["a", "a.1", "a.b"]
    assert common_prefix(paths) == "model.layers"
    assert common_prefix([]) == ""


def test_layout_groups_partition_the_ranks() -> None:
    layout = Layout(tp=2, pp=3, dp=2, cp=2)
    assert layout.world_size == 24
    places = [tuple(layout.coordinates(rank).values()) for rank in range(24)]
    assert len(set(places)) == 24
    for axis in ("tp", "cp", "dp", "pp"):
        groups = layout.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(24))
        assert {len(group) for group in groups} == {getattr(layout, axis)}
    assert layout.groups("tp")[0] == [0, 1]  # tp changes fastest, pp slowest
    assert layout.groups("pp")[0] == [0, 8, 16]


def test_layout_errors_name_the_fields() -> None:
    with pytest.raises(LayoutError, match=r"parallel\.ep \(3\) does not divide .* \(4\); use one of 1, 2, 4"):
        Layout(tp=2, dp=2, ep=3).validate()
    with pytest.raises(LayoutError, match="rank 4 is outside the layout's 4 ranks"):
        Layout(tp=4).coordinates(4)
    assert Layout(tp=3, pp=2).product_text == "parallel.tp (3) * parallel.pp (2) * parallel.dp (1)"
    assert "parallel.cp (2)" in Layout(cp=2).product_text


def test_integer_helpers() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert nearest(9, [1, 3, 9]) == [9]
    assert nearest(0, [1, 3]) == [1]
    for total in range(8):
        for size in range(1, 6):
            parts = [share(total, size, index) for index in range(size)]
            assert [item for part in parts for item in part] == list(range(total))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
