"""Which readers of quantised weights there are: one file each, one line here."""

from __future__ import annotations

from plop_dist.backends.hf.quantized.bitsandbytes import EightBitReader, FourBitReader
from plop_dist.backends.hf.quantized.torchao import TorchAoReader
from plop_dist.measure.weight import Reader, add_reader

READERS: tuple[Reader, ...] = (FourBitReader(), EightBitReader(), TorchAoReader())


def add_readers() -> None:
    """Put all of them into the table. None imports its quantiser before a weight of its kind is read."""
    for reader in READERS:
        add_reader(reader)
