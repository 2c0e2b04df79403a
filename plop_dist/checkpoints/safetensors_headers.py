"""Which tensors lie in a folder's safetensors files, of which shapes, by their headers: no weight is read.

A file begins with the length of its header (8 bytes, little-endian), then the header as JSON: name to dtype, shape and
the stretch of bytes that the tensor takes behind the header (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plop_dist.errors import ModelError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_NUM_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_AGAIN = "copy or download it again"


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of one tensor: its dtype in safetensors' words (BF16, F32, ...), and its shape."""

    dtype: str
    shape: tuple[int, ...]


def read_headers(folder: Path) -> dict[str, StoredTensor] | None:
    """Return every tensor of the safetensors files that transformers would load from a model's folder.

    None where there are none: no weights at all, or pickled ones (PICKLED). Raises ModelError naming the file that is
    missing, cut off or no safetensors file, or that lacks what the index says it holds.
    """
    if (folder / WEIGHTS_FILE).exists():
        return _read_file(folder / WEIGHTS_FILE)
    if not (folder / INDEX_FILE).exists():
        return None
    place_of = _read_index(folder / INDEX_FILE)
    files = {name: _read_file(folder / name) for name in sorted(set(place_of.values()))}
    for tensor, name in place_of.items():
        if tensor not in files[name]:
            raise ModelError(
                f"'{folder / INDEX_FILE}' says that '{name}' holds '{tensor}', but it does not; the files are not of "
                f"one checkpoint: {_AGAIN}, all files together."
            )
    # transformers loads whatever is in the files that the index names.
    return {tensor: stored for file in files.values() for tensor, stored in file.items()}


def _read_index(path: Path) -> dict[str, str]:
    tree = _parse(path, _read(path, 0, path.stat().st_size) if path.is_file() else b"")
    place_of = tree.get("weight_map") if isinstance(tree, Mapping) else None
    if not isinstance(place_of, Mapping) or not place_of:
        raise ModelError(f"'{path}' has no weight_map of tensor to file; {_AGAIN}.")
    for name in place_of.values():
        if not isinstance(name, str) or not name or "\0" in name:
            raise ModelError(f"'{path}' names {str(name)[:80]!r}, expected the name of a file; {_AGAIN}.")
    missing = sorted(name for name in set(place_of.values()) if not (path.parent / name).is_file())
    if missing:
        count = len(set(place_of.values()))
        raise ModelError(
            f"'{path}' names {count} files, of which {len(missing)} {'is' if len(missing) == 1 else 'are'} missing, "
            f"e.g. '{missing[0]}'; copy or download the rest."
        )
    return dict(place_of)


def _read_file(path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        raise ModelError(f"'{path}' is a folder, expected a safetensors file; {_AGAIN}.")
    size = path.stat().st_size
    (length,) = struct.unpack("<Q", _read(path, 0, 8).ljust(8, b"\xff"))
    if length > min(size - 8, _MAX_HEADER):
        raise ModelError(f"'{path}' ({size:,} bytes) is cut off within its header, or no safetensors file; {_AGAIN}.")
    header = _parse(path, _read(path, 8, length))
    if not isinstance(header, Mapping):
        raise ModelError(f"'{path}' has a header that is no JSON object; {_AGAIN}.")
    found: dict[str, StoredTensor] = {}
    stretches = []
    for name, entry in header.items():
        if name != "__metadata__":
            found[name], stretch = _entry(path, name, entry)
            stretches.append(stretch)
    end = 0
    for start, stop in sorted(stretches):
        if start != end:
            raise ModelError(f"'{path}' has a header whose tensors do not lie end to end; {_AGAIN}.")
        end = stop
    if 8 + length + end != size:
        state = "is cut off" if size < 8 + length + end else "goes on behind its last tensor"
        raise ModelError(f"'{path}' {state}: it has {size:,} bytes, by its header {8 + length + end:,}; {_AGAIN}.")
    return found


def _entry(path: Path, name: str, entry: Any) -> tuple[StoredTensor, tuple[int, int]]:
    """Return what a header's entry says, and the stretch of bytes behind the header that the tensor takes."""
    if isinstance(entry, Mapping):
        dtype, shape, stretch = entry.get("dtype"), _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
        if isinstance(dtype, str) and shape is not None and stretch is not None and len(stretch) == 2:
            num_bits = 8 * (stretch[1] - stretch[0])
            if dtype not in _NUM_BITS or num_bits == math.prod(shape) * _NUM_BITS[dtype]:
                return StoredTensor(dtype, shape), (stretch[0], stretch[1])
    raise ModelError(f"'{path}' has a header with a wrong dtype, shape or place of '{name[:80]}'; {_AGAIN}.")


def _counts(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value):
        return tuple(value)
    return None


def _read(path: Path, start: int, length: int) -> bytes:
    try:
        with path.open("rb") as handle:
            handle.seek(start)
            return handle.read(length)
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read: {error.strerror or error}.") from error


def _parse(path: Path, text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, nested too deep
        raise ModelError(f"'{path}' holds what is no JSON where it should; it is damaged: {_AGAIN}.") from None
