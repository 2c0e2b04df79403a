"""How results reach the disk: atomically, as readable as the umask lets them be, through no link, never by pickle."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from plop_dist.errors import RunDirError, ScoresError
from plop_dist.values.visible import check_names, may_hide_something

_MOST_DIGITS = 300  # of a whole number that a float can hold
LINKED = ("wandb",)  # folders of loggers, which hold links of their own to the newest run


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole or absent; an earlier one stays if that fails. Raises RunDirError."""
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write files that belong together: temporary files in the same directories, fsync, and only then the renames.

    A link in the place of a file is replaced and not followed. Raises RunDirError naming path and cause (read-only,
    full disk); all earlier files then stay as they were.
    """
    staged: dict[Path, str] = {}
    path = Path()
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, staged[path] = _open_new(path)
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
        for path in contents:
            os.replace(staged[path], path)
            del staged[path]
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        for temporary in staged.values():
            Path(temporary).unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Append one line of UTF-8 text to a file of its own. Raises RunDirError naming path and cause, as a link."""
    try:
        # Without O_NONBLOCK a pipe in the file's place would be waited on for ever.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8") as handle:
            kind = os.fstat(handle.fileno())
            if not stat.S_ISREG(kind.st_mode) or kind.st_nlink > 1:
                raise OSError(errno.ELOOP, "it is no file of its own, but a device, a pipe or a second name")
            handle.write(line + "\n")
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise _is_link(path) from error
        raise _cannot_write(path, error) from error


def make_folder(path: Path, root: Path) -> None:
    """Make a folder below a run directory. Raises RunDirError where it, or one on the way from `root`, is a link."""
    below = path.relative_to(root).parts
    for depth in range(len(below) + 1):
        folder = root.joinpath(*below[:depth])
        if depth and folder.is_symlink():
            raise _is_link(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error


def refuse_links(root: Path, *, besides: Container[str] = ()) -> None:
    """Raise RunDirError if anything below a directory is a symbolic link: through it other files are read or written.

    besides: names of folders that are not looked into, and of links that may be. `root` itself may be one.
    """
    folders = [root]
    while folders:
        try:
            entries = sorted(os.scandir(folders.pop()), key=lambda entry: entry.name)
        except OSError:  # not there, or not to be read: what is read or written there says so
            continue
        for entry in entries:
            if entry.name in besides:
                continue
            if entry.is_symlink():
                raise _is_link(Path(entry.path))
            if entry.is_dir(follow_symlinks=False):
                folders.append(Path(entry.path))


def remove(path: Path) -> None:
    """Remove a file, if it is there. Raises RunDirError naming path and cause, a folder in its place too."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RunDirError(
            f"cannot delete {path}: {error.strerror or error}; delete it yourself, or choose another run_dir."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises RunDirError."""
    write_bytes(path, text.encode())


def write_json(path: Path, tree: Any) -> None:
    """Write JSON atomically, refusing NaN (which is not JSON). Raises RunDirError."""
    write_bytes(path, json_bytes(tree))


def json_bytes(tree: Any) -> bytes:
    """Return JSON as write_json writes it."""
    return (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode()


def read_json(path: Path, what: str, remedy: str) -> Any:
    """Return the JSON of a file. Raises ScoresError naming path, line and remedy if it is missing or malformed.

    Malformed is also text that is not whole Unicode: half of a surrogate pair, which nothing could be written with; a
    whole number that no float holds; and a name with characters that are not seen where it is shown.
    """
    try:
        text = no_pipe(path).read_text(encoding="utf-8")
        tree = json.loads(text, parse_int=_whole_number)
        _check_surrogates(text)
        if may_hide_something(text):
            check_names(tree, str(path), remedy, ScoresError)
        return tree
    except FileNotFoundError:
        raise ScoresError(f"{path} does not exist: no {what} there; {remedy}.") from None
    except json.JSONDecodeError as error:
        raise ScoresError(
            f"{path} is not whole JSON: {error.msg} at line {error.lineno} column {error.colno}; {remedy}."
        ) from error
    except ScoresError:
        raise
    except RecursionError:
        raise ScoresError(f"{path} is nested too deeply to be {what}; {remedy}.") from None
    except (OSError, ValueError) as error:  # not UTF-8, or a path with a null byte
        raise ScoresError(f"{path} cannot be read: {error}; {remedy}.") from error


def _whole_number(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"{text[:20]}... has {len(text)} digits, which no number in such a file has")
    return int(text)


def is_pipe(path: Path) -> bool:
    """Tell whether a path leads to a pipe, a socket or a device."""
    return path.exists() and not path.is_file() and not path.is_dir()


def no_pipe(path: Path) -> Path:
    """Return the path. Raises OSError for a pipe or a device there, whose reading may never end."""
    if is_pipe(path):
        raise OSError(errno.EINVAL, "it is a pipe or a device, and no regular file", str(path))
    return path


def content_hash(path: Path) -> str | None:
    """Return a short hash of a file's content, None if it is absent."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None


def _check_surrogates(text: str) -> None:
    """Raise ValueError if an escape in a JSON text stands for half of a surrogate pair."""
    # Escaped backslashes first: what follows one of these is no escape. Whole pairs second.
    escapes = re.finditer(r"\\\\|\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\u[dD][89a-fA-F]..", text)
    odd = next((match[0] for match in escapes if len(match[0]) == 6), None)
    if odd is not None:
        raise ValueError(f"it holds {odd}, half of a surrogate pair, so that its text is not whole Unicode")


def array_bytes(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Return named arrays as the content of one safetensors file, which read_arrays reads."""
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, dict(metadata))


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the arrays and the metadata of a safetensors file. Raises ScoresError if it is missing or malformed."""
    from safetensors import SafetensorError, safe_open

    arrays = {}
    try:
        with safe_open(path, framework="np") as handle:
            names, metadata = list(handle.keys()), dict(handle.metadata() or {})
        for name in names:
            # The file is mapped while it is open: what has been copied counts twice until it is closed again.
            with safe_open(path, framework="np") as handle:
                arrays[name] = handle.get_tensor(name)
        return arrays, metadata
    except (SafetensorError, OSError) as error:
        raise ScoresError(f"{path} cannot be read as safetensors: {error}; delete it and score again.") from error


def _open_new(path: Path) -> tuple[int, str]:
    """Return a descriptor of a new file beside `path`, and its name; its mode is what the umask leaves of 0666."""
    while True:
        name = str(path.with_name(f".{path.name}.{secrets.token_hex(6)}"))
        with suppress(FileExistsError):
            return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), name


def _is_link(path: Path) -> RunDirError:
    return RunDirError(
        f"{path} is a symbolic link, and nothing inside a run directory is read or written through one: what it leads "
        "to may be anybody's; put the file or folder itself there, or delete the link."
    )


def _cannot_write(path: Path, error: OSError) -> RunDirError:
    return RunDirError(
        f"cannot write {path}: {error.strerror or error}; make run_dir writable, free space, or choose another run_dir."
    )
