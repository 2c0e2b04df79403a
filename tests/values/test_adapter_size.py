"""Counts of trainable parameters that need no model; equality with PEFT's own count is in test_exporters_peft."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from plop_dist.values.adapter_size import AdapterSizes, is_whole, num_trainable_parameters
from plop_dist.values.names import expert_index
from tests.exporters.cases import projection


def fused(name: str, rows: int, *, layer: int = 0):
    path = f"model.layers.{layer}.self_attn"
    return projection(f"{path}.{name}", 32, rows, "fused", f"{path}.qkv_proj")


def expert(index: int, name: str, sizes: tuple[int, int]):
    holder = "gate_up_proj" if name != "down_proj" else name
    return projection(
        f"m.layers.0.mlp.experts.{index}.{name}", *sizes, "expert_parameter", f"m.layers.0.mlp.experts.{holder}"
    )


QKV = [fused("q_proj", 32), fused("k_proj", 16), fused("v_proj", 16)]


def test_own_linears_count_a_and_b():
    linears = [projection("m.0.q_proj", 32, 64), projection("m.0.c_fc", 10, 20, "conv1d")]
    assert num_trainable_parameters(linears, lambda item: 4) == 4 * (32 + 64) + 4 * (10 + 20)


def test_a_whole_fused_linear_has_one_a_at_the_highest_rank_of_its_parts():
    assert num_trainable_parameters(QKV, lambda item: 4) == 4 * (32 + 64)
    assert num_trainable_parameters(QKV, lambda item: 8 if item.type == "v_proj" else 4) == 8 * (32 + 64)


def test_parts_of_a_fused_linear_count_by_themselves():
    assert not is_whole(QKV[:2])
    assert num_trainable_parameters(QKV[:2], lambda item: 4) == 4 * (32 + 32) + 4 * (32 + 16)


def test_parts_of_different_layers_do_not_make_a_whole():
    parts = [QKV[0], QKV[1], fused("v_proj", 16, layer=1)]
    assert num_trainable_parameters(parts, lambda item: 4) == 4 * (32 + 32) + 4 * (32 + 16) + 4 * (32 + 16)


def test_experts_in_one_parameter_have_r_rows_each_and_silent_ones_are_added():
    down = [expert(index, "down_proj", (48, 32)) for index in range(3)]
    pair = [expert(index, name, (32, 48)) for index in range(3) for name in ("gate_proj", "up_proj")]
    assert num_trainable_parameters(down, lambda item: 4) == 4 * 3 * (48 + 32)
    assert num_trainable_parameters(pair, lambda item: 4) == 4 * 3 * (32 + 2 * 48)
    silent = [expert(3, "down_proj", (48, 32)), expert(3, "up_proj", (32, 48))]
    assert num_trainable_parameters(down, lambda item: 4, silent) == 4 * 4 * (48 + 32)


def plain_count(modules, rank_of, left_out):
    """What num_trainable_parameters says, holder by holder and part by part."""
    total = 0
    for holder in {module.holder for module in modules}:
        parts = [module for module in modules if module.holder == holder]
        if parts[0].storage in ("fused", "expert_parameter"):
            parts += [part for part in left_out if part.holder == holder]
            if is_whole(parts):
                rows = {part.type: part.out_features for part in parts}
                num_experts = len({expert_index(part.fqn) for part in parts})
                total += max(map(rank_of, parts)) * num_experts * (parts[0].in_features + sum(rows.values()))
                continue
        total += sum(rank_of(part) * (part.in_features + part.out_features) for part in parts)
    return total


EVERYTHING = [
    *(
        fused(name, rows, layer=layer)
        for layer in (0, 1)
        for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 8))
    ),
    *(expert(index, name, (32, 48)) for index in range(3) for name in ("gate_proj", "up_proj")),
    *(expert(index, "down_proj", (48, 32)) for index in range(3)),
    projection("m.layers.0.o_proj", 32, 64),
    projection("m.layers.0.c_fc", 10, 20, "conv1d"),
]


@settings(max_examples=150, deadline=None)
@given(
    order=st.permutations(range(len(EVERYTHING))),
    num_scored=st.integers(1, len(EVERYTHING)),
    sets=st.lists(st.integers(-1, 2), min_size=len(EVERYTHING), max_size=len(EVERYTHING)),
    ranks=st.lists(st.sampled_from([4, 4, 8, 16]), min_size=len(EVERYTHING), max_size=len(EVERYTHING)),
)
def test_sets_and_their_first_members_count_as_each_by_itself(order, num_scored, sets, ranks):
    parts = [EVERYTHING[index] for index in order]
    rank = {part.fqn: r for part, r in zip(EVERYTHING, ranks, strict=True)}
    modules, left_out = parts[:num_scored], parts[num_scored::2]

    def rank_of(part):
        return rank[part.fqn]

    sizes = AdapterSizes(modules, rank_of, left_out)
    running = sizes.running(np.arange(num_scored))
    for num in range(1, num_scored + 1):
        assert running[num - 1] == plain_count(modules[:num], rank_of, left_out)
    set_P = np.array(sets[:num_scored])
    for number, total in enumerate(sizes.totals(set_P, 3)):
        members = [module for module, own in zip(modules, set_P, strict=True) if own == number]
        assert total == plain_count(members, rank_of, left_out) == sizes.total(set_P == number)
    doubled = sizes.with_ranks(lambda part: 2 * rank_of(part))
    assert doubled.total(set_P >= 0) == 2 * sizes.total(set_P >= 0)
