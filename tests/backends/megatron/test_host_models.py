"""What a host's own Megatron model may be that cannot be scored exactly: refused by the name of its field."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plop_dist.backends.megatron.batch import Batching
from plop_dist.backends.megatron.checks import check_experts, check_heads
from plop_dist.backends.megatron.groups import Place
from plop_dist.errors import LayoutError, ModelError
from plop_dist.measure.protocols import MicroBatch
from tests.installed import needs_bridge


class MaskType(Enum):
    causal = 1
    padding = 2


class DotProductAttention(nn.Module):
    """Megatron's own, which puts a window's mask in the place of the one that it is given."""

    def __init__(self, window: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.scale_mask_softmax = SimpleNamespace(window_size=window)


class TEDotProductAttention(nn.Module):
    """Transformer Engine's, which is given none."""


def _chunk(*attention: nn.Module, groups: int = 4, mask: MaskType = MaskType.causal, stack: str = "decoder") -> Any:
    chunk: Any = nn.Module()
    chunk.config = SimpleNamespace(num_query_groups=groups)
    holder: Any = nn.Module()
    setattr(chunk, stack, holder)
    holder.layers = nn.ModuleList()
    for core in attention:
        layer: Any = nn.Module()
        own: Any = nn.Module()
        own.core_attention, own.attn_mask_type = core, mask
        layer.self_attention = own
        holder.layers.append(layer)
    return chunk


def _prepare(*chunks: Any) -> Tensor | None:
    place = Place(tp_rank=0, tp_size=1, pp_size=2, cp_rank=0, cp_size=1, ep_rank=0, is_sequence_parallel=False)
    ids, positions = torch.arange(4, 9)[None], torch.tensor([[0, 1, 2, 0, 1]])
    packed = MicroBatch(ids, torch.ones_like(ids), torch.tensor([[0, 0, 0, 1, 1]]), positions)
    batching = Batching(chunks, place, torch.device("cpu"))
    assert batching.prepare(MicroBatch(ids, packed.attention_mask, 0 * ids)).input_ids.equal(ids)
    return batching.prepare(packed).mask


def test_packed_samples_are_kept_apart_wherever_the_layers_lie() -> None:
    first, other = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 0, 0, 1, 1])
    expected = (first[:, None] < first) | (other[:, None] != other)
    for chunks in ((_chunk(DotProductAttention()),), (_chunk(), _chunk(DotProductAttention()))):
        mask = _prepare(*chunks)
        assert mask is not None
        assert mask[0, 0].equal(expected)
    assert _prepare(_chunk()) is None  # embeddings alone


@pytest.mark.parametrize(
    "attention",
    [
        [TEDotProductAttention()],
        [DotProductAttention(window=(3, 0))],
        [DotProductAttention(), DotProductAttention(window=(3, 0))],
        [DotProductAttention(), nn.Identity()],
    ],
)
def test_packed_rows_are_refused_where_any_layer_takes_no_mask(attention: list[nn.Module]) -> None:
    with pytest.raises(ModelError, match=r"packed rows \(position_ids that start again .* without a sliding window"):
        _prepare(_chunk(*attention))


def test_pieces_of_a_query_group_are_refused() -> None:
    check_heads([_chunk(DotProductAttention(), groups=2)], 2)
    with pytest.raises(LayoutError, match=r"num_query_groups is 1 and the tensor-parallel size 2: .* at most 1\."):
        check_heads([_chunk(DotProductAttention(), groups=1)], 2)


@pytest.mark.parametrize("stack", ["decoder", "encoder"])
def test_attention_that_sees_what_comes_later_is_refused(stack: str) -> None:
    chunk = _chunk(DotProductAttention(), mask=MaskType.padding, stack=stack)
    with pytest.raises(ModelError, match=rf"'{stack}\.layers\.0' has attn_mask_type 'padding': .* causal"):
        check_heads([chunk], 1)
    around: Any = nn.Module()
    around.language_model = chunk
    check_heads([around], 1)


EXPERTS = {"num_moe_experts": 4, "moe_token_dispatcher_type": "alltoall", "moe_pad_expert_input_to_capacity": False,
           "moe_shared_expert_overlap": False}  # fmt: skip


@needs_bridge
@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("moe_pad_expert_input_to_capacity", True, "is on: experts then also see tokens that were never routed"),
        ("moe_router_padding_for_quantization", True, "is on: experts then also see tokens that were never routed"),
        ("moe_input_jitter_eps", 0.01, "is 0.01: the router then sends tokens to experts by chance"),
        ("moe_router_force_load_balancing", True, "is True: the router then sends tokens to experts by chance"),
        ("moe_router_force_biased", 1.0, "is 1.0: the router then sends tokens to experts by chance"),
        ("moe_mlp_glu_interleave_size", 32, "is 32: gate and up of an expert then share out its rows in blocks"),
    ],
)
def test_experts_that_are_fed_or_cut_otherwise_are_refused(field: str, value: Any, why: str) -> None:
    check_experts(SimpleNamespace(**EXPERTS))
    with pytest.raises(ModelError, match=f"^{field} {why}"):
        check_experts(SimpleNamespace(**{**EXPERTS, field: value}))
