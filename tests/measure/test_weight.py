"""A weight is read by rows, from the reader that knows it; what no reader knows is refused by name."""

# O out_features, I in_features

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import plop_dist
from plop_dist.backends.hf.linears import find_linears
from plop_dist.errors import ModelError
from plop_dist.measure import weight as weights
from plop_dist.measure.blocks import Block, Rows
from plop_dist.measure.weight import Stored, Weight, add_reader, find_weight, is_readable, read_weight
from plop_dist.values.scores import Projection
from tests.models import random_tokens, tiny


def numbered(num_rows: int, num_columns: int = 3) -> Tensor:
    return torch.arange(float(num_rows * num_columns)).view(num_rows, num_columns)


@pytest.mark.parametrize(("num_bytes", "sizes"), [(1, [1] * 7), (4 * 3 * 2, [2, 2, 2, 1]), (10**9, [7])])
def test_blocks_are_all_rows_in_order_and_no_larger_than_asked(num_bytes: int, sizes: list[int]) -> None:
    weight_OI = numbered(7)
    blocks = list(Weight.of(weight_OI).blocks(num_bytes))
    assert [len(block) for block in blocks] == sizes
    assert torch.equal(torch.cat(blocks), weight_OI)
    assert all(block.untyped_storage().data_ptr() == weight_OI.untyped_storage().data_ptr() for block in blocks)


@pytest.mark.parametrize("rows", [None, Rows(24, 4, 20), Rows(6, 2, 5), Rows(6, 0, 1), Rows(2, 1, 2)])
@pytest.mark.parametrize("num_bytes", [1, 4 * 3 * 5, 10**9])
def test_a_fused_projection_is_read_by_blocks_like_whole(rows: Rows | None, num_bytes: int) -> None:
    weight_OI = numbered(24)
    block = Block(Projection(fqn="q", type="q", in_features=3, out_features=24), rows)
    own = [r for r in range(24) if rows is None or rows.start <= r % rows.period < rows.stop]
    expected_OI = weight_OI[own]
    taken = block.take_weight(Weight.of(weight_OI))
    assert taken.shape == tuple(expected_OI.shape)
    assert torch.equal(torch.cat(list(taken.blocks(num_bytes))), expected_OI)
    assert torch.equal(taken.dense(), expected_OI)
    assert torch.equal(block.take_rows(weight_OI), expected_OI)


def test_conv1d_and_matrices_of_a_stack_are_turned() -> None:
    conv = Conv1D(5, 3)  # (nf, nx): maps 3 features to 5
    assert torch.equal(read_weight(conv), conv.weight.detach().T)
    stack = nn.Module()
    stack.both = nn.Parameter(torch.randn(2, 3, 4))
    assert torch.equal(find_weight(Stored(stack, "both", 1)).dense(), stack.both.detach()[1])
    assert torch.equal(find_weight(Stored(stack, "both", 0, is_transposed=True)).dense(), stack.both.detach()[0].T)


class Packed(Tensor):
    """A tensor subclass as quantisers bring them: floating by its looks, other values inside."""


def with_weight(make: Any) -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(make(linear.weight.detach()), requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("linear", "kind"),
    [
        (with_weight(lambda w: w.to(torch.float8_e4m3fn)), r"Linear, weight torch\.float8_e4m3fn"),
        (with_weight(lambda w: (w * 10).to(torch.int8)), r"Linear, weight torch\.int8"),
        (with_weight(lambda w: w.as_subclass(Packed)), r"Linear, weight torch\.float32"),
    ],
)
def test_what_no_reader_knows_is_refused_by_name(linear: nn.Linear, kind: str) -> None:
    model = nn.ModuleDict({"block": nn.ModuleDict({"odd": linear})})
    with pytest.raises(
        ModelError, match=rf"'block\.odd' holds quantised weights \({kind}\), whose norms cannot be read"
    ):
        find_linears(model)
    with pytest.raises(ModelError, match=r"The weight of 'block\.odd' is a .* in a Linear, whose values nothing here"):
        read_weight(linear, "block.odd")


def test_a_packed_module_and_one_without_values_are_refused() -> None:
    linear: Any = nn.Linear(4, 4)
    linear.qweight = torch.zeros(2, dtype=torch.int32)
    assert not is_readable(Stored(linear))
    with pytest.raises(ModelError, match="'block' holds quantised weights"):
        find_linears(nn.ModuleDict({"block": linear}))
    away = nn.Linear(4, 4, device="meta")
    assert is_readable(Stored(away))
    with pytest.raises(ModelError, match=r"The weight of 'away' has no values: it is on the meta device"):
        read_weight(away, "away")


class Scaled(nn.Linear):
    """A linear quantised to int8 with one scale per row, whose forward multiplies by the dequantised weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.scale = nn.Parameter(linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127)
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.linear(z, self.scale * self.weight)


class ScaledReader:
    """What a quantiser's backend adds: rows dequantised as they are asked for."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def knows(self, stored: Stored) -> bool:
        return isinstance(stored.module, Scaled)

    def read(self, stored: Stored) -> Weight:
        module: Any = stored.module

        def read(start: int, stop: int) -> Tensor:
            self.rows += range(start, stop)
            return (module.scale[start:stop] * module.weight[start:stop]).detach()

        return Weight(tuple(module.weight.shape), torch.float32, module.weight.device, read)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ScaledReader:
    monkeypatch.setattr(weights, "_READERS", list(weights._READERS))
    reader = ScaledReader()
    add_reader(reader)
    add_reader(reader)
    assert weights._READERS.count(reader) == 1
    return reader


def test_a_reader_from_outside_scores_a_quantised_model_as_its_dequantised_one(table: ScaledReader) -> None:
    model, dense = tiny("llama"), tiny("llama")
    for layer, other in zip(model.model.layers, dense.model.layers, strict=True):
        layer.mlp.up_proj = Scaled(layer.mlp.up_proj)
        scaled = layer.mlp.up_proj
        other.mlp.up_proj.weight.data = (scaled.scale * scaled.weight).detach()
    batches = [{"input_ids": random_tokens(2, 9)}]
    table.rows.clear()
    found = plop_dist.score(model, batches, num_directions=4)
    expected = plop_dist.score(dense, batches, num_directions=4)
    assert [(module.fqn, module.nfn) for module in found.modules] == [
        (module.fqn, pytest.approx(module.nfn, rel=1e-6)) for module in expected.modules
    ]
    num_rows = model.model.layers[0].mlp.up_proj.out_features
    # Once for the baseline; once more where the module has to prove that it does W z.
    assert sorted(table.rows) == sorted([*range(num_rows)] * 4)
