"""How results reach the disk: atomically, readable by anyone, never through pickle."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from plop_dist.errors import RunDirError, ScoresError


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole or absent: a temporary file in the same directory, fsync, rename.

    Raises RunDirError naming path and cause (read-only, full disk); an earlier file of that name stays as it was.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise RunDirError(
            f"cannot write {path}: {error.strerror or error}; make run_dir writable, free space, "
            "or choose another run_dir."
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises RunDirError."""
    write_bytes(path, text.encode())


def write_json(path: Path, tree: Any) -> None:
    """Write JSON atomically, refusing NaN (which is not JSON). Raises RunDirError."""
    write_text(path, json.dumps(tree, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, what: str, remedy: str) -> Any:
    """Return the JSON of a file. Raises ScoresError naming path, line and remedy if it is missing or malformed."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ScoresError(f"{path} does not exist: no {what} there; {remedy}.") from None
    except json.JSONDecodeError as error:
        raise ScoresError(
            f"{path} is not whole JSON: {error.msg} at line {error.lineno} column {error.colno}; {remedy}."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ScoresError(f"{path} cannot be read: {error}; {remedy}.") from error


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write named arrays as one safetensors file, atomically. Raises RunDirError."""
    from safetensors.numpy import save

    write_bytes(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, dict(metadata)))


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the arrays and the metadata of a safetensors file. Raises ScoresError if it is missing or malformed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, dict(handle.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ScoresError(f"{path} cannot be read as safetensors: {error}; delete it and score again.") from error
