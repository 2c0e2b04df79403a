"""Which output features of a module belong to which logical projection: fused q, k, v and gate, up are told apart."""

# T tokens, I in_features, O out_features

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from plop_dist.measure.weight import Weight
from plop_dist.values.scores import Projection


@dataclass(frozen=True)
class Rows:
    """The output features r of a fused linear with start <= r % period < stop.

    One period of all the rows is a plain contiguous block; shorter periods are layouts interleaved per attention head
    or per key-value group.
    """

    period: int
    start: int
    stop: int

    @property
    def width(self) -> int:
        """How many rows of each period are taken."""
        return self.stop - self.start


@dataclass(frozen=True)
class Block:
    """One logical projection inside a module's output; `rows` None means that it owns all of it.

    projection: with the global sizes.
    """

    projection: Projection
    rows: Rows | None = None

    def take(self, y_TO: Tensor) -> Tensor:
        """Return this projection's output features of y, (..., O_block); a view where they are contiguous.

        y_TO: (..., O), the module's output, or its bias (O,); O may be a shard of whole periods.
        """
        return y_TO if self.rows is None else _take(y_TO, self.rows, y_TO.dim() - 1)

    def take_rows(self, weight_OI: Tensor) -> Tensor:
        """Return this projection's rows, (O_block, I), of a tensor (O, I); a view where they are contiguous."""
        return self.take_weight(Weight.of(weight_OI)).dense()

    def take_weight(self, weight: Weight) -> Weight:
        """Return this projection's weight, (O_block, I), from the module's, (O, I); nothing is read yet."""
        if self.rows is None:
            return weight
        rows, (num_rows, num_columns) = self.rows, weight.shape
        if num_rows == rows.period:
            return weight.narrow(rows.start, rows.stop)

        def read(start: int, stop: int) -> Tensor:
            first, last = start // rows.width, -(-stop // rows.width)
            periods_OI = _take(weight.read(first * rows.period, last * rows.period), rows, 0)
            return periods_OI[start - first * rows.width : stop - first * rows.width]

        shape = (num_rows // rows.period * rows.width, num_columns)
        return Weight(shape, weight.dtype, weight.device, read)


def _take(tensor: Tensor, rows: Rows, dim: int) -> Tensor:
    if tensor.shape[dim] == rows.period:
        return tensor.narrow(dim, rows.start, rows.width)
    periods = tensor.unflatten(dim, (-1, rows.period))
    return periods.narrow(dim + 1, rows.start, rows.width).flatten(dim, dim + 1)
