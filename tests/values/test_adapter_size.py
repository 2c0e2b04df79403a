"""Counts of trainable parameters that need no model; equality with PEFT's own count is in test_exporters_peft."""

from __future__ import annotations

from plop_dist.values.adapter_size import is_whole, num_trainable_parameters
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
