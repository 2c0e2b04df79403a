"""Which readers of quantised weights there are: one file each, one line here."""

from __future__ import annotations

from plop_dist.backends.hf.computed_weights import COMPUTED_READER
from plop_dist.backends.hf.quantized.bitnet import BitNetReader
from plop_dist.backends.hf.quantized.bitsandbytes import EightBitReader, FourBitReader
from plop_dist.backends.hf.quantized.compressed_tensors import CompressedTensorsReader
from plop_dist.backends.hf.quantized.fp8 import Float8Reader
from plop_dist.backends.hf.quantized.quanto import QuantoReader
from plop_dist.backends.hf.quantized.torchao import TorchAoReader
from plop_dist.measure.weight import Reader, add_reader

# The last one is asked first: what a quantiser's own reader knows is not found out by calling the module.
READERS: tuple[Reader, ...] = (
    COMPUTED_READER,
    FourBitReader(),
    EightBitReader(),
    TorchAoReader(),
    QuantoReader(),
    CompressedTensorsReader(),
    Float8Reader(),
    BitNetReader(),
)


def add_readers() -> None:
    """Put all of them into the table. None imports its quantiser before a weight of its kind is read."""
    for reader in READERS:
        add_reader(reader)
