"""The values of a module's weight, as the forward pass multiplies by it: dense, floating point, by rows.

`read_weight` and `find_weight` are the only readers of a weight's values for scoring. What they know is a table: a
plain reader for tensors that hold their own values, and before it the readers that backends and quantisers add with
`add_reader`. A weight that none of them knows is refused by name, never guessed.
"""

# O out_features, I in_features, E experts

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plop_dist.errors import ModelError

# Gives parameters that are partitioned between forward passes (ZeRO-3, FSDP) for the length of a block: whole tensors
# in their place. Collective, in the same order on every rank.
Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Sequence[Tensor]]]


@dataclass(frozen=True)
class Weight:
    """A weight W, (O, I): this rank's part of it where features are sharded.

    shape, dtype, device: of all of it. read(start, stop): its rows from start to stop, (stop - start, I), dense and of
    a floating dtype; a view where it is stored so, made anew (dequantised, copied from disk) where it is not.
    rounding: how far from W z, of its norm, the module's own output may be because its kernel rounds what it is given
    (int8 activations).
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    read: Callable[[int, int], Tensor]
    rounding: float = 0.0

    @classmethod
    def of(cls, weight_OI: Tensor) -> Weight:
        """Return a dense tensor, (O, I), as a Weight."""
        num_rows, num_columns = weight_OI.shape
        return cls(
            (num_rows, num_columns), weight_OI.dtype, weight_OI.device, lambda start, stop: weight_OI[start:stop]
        )

    @classmethod
    def unpacked(
        cls,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        unpack: Callable[[], Tensor],
        rounding: float = 0.0,
    ) -> Weight:
        """Return a weight that can only be dequantised whole: by unpack(), once, when its first rows are read."""
        kept: list[Tensor] = []

        def read(start: int, stop: int) -> Tensor:
            if not kept:
                kept.append(unpack())
            return kept[0][start:stop]

        return cls(shape, dtype, device, read, rounding)

    def dense(self) -> Tensor:
        """Return all rows, (O, I)."""
        return self.read(0, self.shape[0])

    def blocks(self, num_bytes: int) -> Iterator[Tensor]:
        """Yield all rows in turn, in blocks (o, I) of at most num_bytes as float32, of one row at the least."""
        num_rows, num_columns = self.shape
        step = max(1, num_bytes // (4 * max(1, num_columns)))
        for start in range(0, num_rows, step):
            yield self.read(start, min(start + step, num_rows))

    def narrow(self, start: int, stop: int) -> Weight:
        """Return the weight of the output features from start to stop."""
        shape = (stop - start, self.shape[1])
        rows = lambda first, last: self.read(start + first, start + last)  # noqa: E731
        return Weight(shape, self.dtype, self.device, rows, self.rounding)


@dataclass(frozen=True)
class Stored:
    """Where a weight lies: in the attribute `name` of `module`.

    index: which of the matrices of a 3-D parameter. is_transposed: a matrix of plain values is (I, O) there. whole: the
    parameter as it was gathered (ZeRO-3, FSDP), where the attribute holds a part alone. path: for messages.
    """

    module: nn.Module
    name: str = "weight"
    index: int | None = None
    is_transposed: bool = False
    whole: Tensor | None = None
    path: str = ""

    @property
    def values(self) -> Any:
        """What the attribute holds on this rank, gathered or not; None where there is no such attribute."""
        return getattr(self.module, self.name, None) if self.whole is None else self.whole


class Reader(Protocol):
    """Reads the weights of modules of its kind. A quantiser's is one such object, given to `add_reader`.

    It may have `methods`, the quant_methods of transformers' configurations whose modules it reads: others are refused
    before anything is loaded.
    """

    def knows(self, stored: Stored) -> bool:
        """Tell whether this weight is of its kind, by classes and dtypes alone: the values may not be there (meta)."""
        ...

    def read(self, stored: Stored) -> Weight:
        """Return the weight, (O, I). Local: what is partitioned has been gathered (stored.whole)."""
        ...


def add_reader(reader: Reader) -> None:
    """Put a reader into the table; the last one added is asked first. Adding it again changes nothing."""
    if reader not in _READERS:
        _READERS.append(reader)


def find_weight(stored: Stored) -> Weight:
    """Return a module's weight without reading its values yet. Local. Raises ModelError where no reader knows it."""
    reader = reader_of(stored)
    if reader is None:
        raise ModelError(
            f"The {stored.name} of {_where(stored)} is {_kind(stored)}, whose values nothing here can read; load the "
            f"model in float32, bfloat16 or float16, or quantised by {', '.join(readable_methods()) or 'none'}."
        )
    return reader.read(stored)


def read_weight(module: nn.Module, path: str = "") -> Tensor:
    """Return the values of a module's weight, (O, I), of a floating dtype. Local. Raises ModelError as find_weight."""
    return find_weight(Stored(module, path=path)).dense()


def is_readable(stored: Stored) -> bool:
    """Tell whether some reader knows this weight; also where its values are not there (meta device, ZeRO-3)."""
    return reader_of(stored) is not None


def is_dense(stored: Stored) -> bool:
    """Tell whether the attribute holds the weight's values themselves, by which nn.Linear multiplies."""
    return isinstance(reader_of(stored), PlainReader)


def readable_methods() -> tuple[str, ...]:
    """Return the quant_methods of transformers whose modules some reader reads, in alphabetical order."""
    return tuple(sorted({method for reader in _READERS for method in getattr(reader, "methods", ())}))


def local(tensor: Any) -> Tensor:
    """Return this rank's part of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class PlainReader:
    """Weights that hold their own values: floating point of at least 16 bits, neither packed nor scaled."""

    def knows(self, stored: Stored) -> bool:
        """Tell whether the parameter is an ordinary tensor in a module that no quantiser has replaced."""
        values = local(stored.values)
        return (
            type(values) in (Tensor, nn.Parameter)
            and values.is_floating_point()
            and values.element_size() >= 2
            and not is_packed(stored.module)
        )

    def read(self, stored: Stored) -> Weight:
        """Return a view of the parameter. Raises ModelError where its values are not there."""
        values = local(stored.values.detach())
        if values.is_meta:
            raise ModelError(
                f"The {stored.name} of {_where(stored)} has no values: it is on the meta device, as after "
                "device_map put it on another medium; load the whole model into memory."
            )
        if stored.index is not None:
            values = values[stored.index]
        return Weight.of(values.T if stored.is_transposed else values)


def is_packed(module: nn.Module) -> bool:
    """Tell whether a quantiser has replaced this module, so that its parameters are not the weight's values."""
    return hasattr(module, "qweight") or any(
        cls.__module__.split(".")[0] in _QUANTISERS for cls in type(module).__mro__
    )


_QUANTISERS = ("bitsandbytes", "auto_gptq", "gptqmodel", "awq", "hqq", "aqlm", "eetq", "quanto")
_READERS: list[Reader] = [PlainReader()]


def reader_of(stored: Stored) -> Reader | None:
    """Return the reader that knows this weight, None where none does."""
    return next((reader for reader in reversed(_READERS) if reader.knows(stored)), None)


def _where(stored: Stored) -> str:
    return f"'{stored.path}'" if stored.path else f"a {type(stored.module).__name__}"


def _kind(stored: Stored) -> str:
    values = stored.values
    if values is None:
        return "missing"
    dtype = getattr(values, "dtype", None)
    return f"a {type(values).__name__} of {dtype} in a {type(stored.module).__name__}"
