"""Files that would make a folder when they are loaded as their frameworks load them: nothing of ours may make it.

Each builder takes the path of that folder, the marker. A test asserts that it is not there, and, so that the assertion
can fail, that loading the same file plainly makes it: `fires`.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

# Other names of os.mkdir: attributes of modules that an index or a checkpoint has every reason to name.
DISGUISES = (
    ("posix", "mkdir"),
    ("torch", "os.mkdir"),
    ("torch", "serialization.os.mkdir"),
    ("pathlib", "os.mkdir"),
    ("torch.distributed.checkpoint.filesystem", "os.mkdir"),
    ("torch.distributed.checkpoint.metadata", "os.mkdir"),
    ("torch.serialization", "os.mkdir"),
    ("deepspeed.runtime.engine", "os.mkdir"),
    ("transformers.trainer", "os.mkdir"),
)  # fmt: skip


class Trap:
    """Makes the marker when it is unpickled, as often as that may be."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (self._marker, 0o777, True)


def call(module: str, name: str, *texts: str, old: bool = False) -> bytes:
    """Return a pickle (protocol 4) that calls module.name(*texts); name may have dots, which are resolved one by one.

    old: by protocol 2's instruction, the only one for names that torch reads with weights_only.
    """

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    found = f"c{module}\n{name}\n".encode() if old else text(module) + text(name) + b"\x93"
    return b"\x80\x04" + found + b"(" + b"".join(map(text, texts)) + b"tR."


def archive(path: Path, pickled: bytes) -> Path:
    """Write an archive as torch.save does, with `pickled` as the instructions in it. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}.items():
            file.writestr(f"archive/{name}", content)
    return path


def torch_file(path: Path, marker: Path, content: Any = None, *, is_zip: bool = True) -> Path:
    """Write `content` with the trap beside it as torch.save does; content None: the trap alone. Returns the path.

    is_zip: else torch's own format of before 1.6.
    """
    trap = Trap(marker)
    whole = {**content, "trap": trap} if isinstance(content, dict) else trap if content is None else [content, trap]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(whole, path, _use_new_zipfile_serialization=is_zip)
    return path


def poison(path: Path, marker: Path) -> Path:
    """Put the trap beside what a file of torch.save holds."""
    return torch_file(path, marker, torch.load(path, weights_only=False))


def bytes_of(marker: Path) -> bytes:
    """Return what torch.save makes of the trap alone."""
    buffer = io.BytesIO()
    torch.save(Trap(marker), buffer)
    return buffer.getvalue()


def poison_entries(directory: Path, marker: Path, *, only: Callable[[str], bool] = lambda key: True) -> list[str]:
    """Put the trap in place of every entry of bytes that a torch.distributed checkpoint holds; returns their keys.

    only: of which keys. Entries of tensors that `only` names are turned into entries of bytes as well.
    """
    index = directory / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    keys = [key for key in metadata.state_dict_metadata if only(key)]
    trap = bytes_of(marker)
    for place, info in list(metadata.storage_data.items()):
        if place.fqn in keys:
            file = directory / info.relative_path
            info.offset, info.length = file.stat().st_size, len(trap)
            file.write_bytes(file.read_bytes() + trap)
            metadata.storage_data[type(place)(place.fqn)] = info
            metadata.state_dict_metadata[place.fqn] = BytesStorageMetadata()
    index.write_bytes(pickle.dumps(metadata))
    return keys


def webdataset(path: Path, marker: Path) -> Path:
    """Write an archive of one sample: a text, and the trap under every ending that decoders of webdataset know."""
    plain = pickle.dumps(Trap(marker))
    parts = {"txt": b"one and two", "pyd": plain, "pickle": plain, "pkl": plain, "pth": bytes_of(marker)}
    with tarfile.open(path, "w") as archive:
        for ending, content in parts.items():
            entry = tarfile.TarInfo(f"000.{ending}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def module(path: Path, marker: Path, rest: str = "") -> Path:
    """Write a Python file that makes the marker when it is imported; rest: what else stands in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\n{rest}")
    return path


def fires(marker: Path, load: Callable[[], Any]) -> bool:
    """Tell whether load() makes the marker, which is taken away again; whatever it raises afterwards does not count."""
    with contextlib.suppress(Exception, CheckpointException):  # what comes after the trap is of no interest
        load()
    made = marker.is_dir()
    if made:
        marker.rmdir()
    return made
