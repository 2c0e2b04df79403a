"""Which rows a data source holds: a jsonl, json, csv, parquet or txt file, a builtin one, or a `datasets` id."""

from __future__ import annotations

import csv
import json
import logging
import sys
from pathlib import Path
from typing import Any

from plop_dist.config.schema import RANDOM_TOKENS
from plop_dist.data.builtin import arithmetic_rows, python_rows, random_rows
from plop_dist.errors import DataError, MissingExtraError, as_cause, without_advice

BUILTIN_FIELD = {"builtin:arithmetic": "question", "builtin:python": "text", RANDOM_TOKENS: "text"}


def load_rows(path: str, split: str = "train") -> list[dict[str, Any]]:
    """Return the rows of a jsonl, json, csv, parquet or txt file, of a builtin source, or of a `datasets` id.

    Raises DataError naming the file, and the line where one is malformed.
    """
    if path == "builtin:arithmetic":
        return list(arithmetic_rows())
    if path == "builtin:python":
        return list(python_rows())
    if path == RANDOM_TOKENS:
        return list(random_rows())
    if path.startswith("builtin:"):
        raise DataError(f"data.path '{path}' is unknown; builtin sources are {', '.join(BUILTIN_FIELD)}.")
    file = Path(path)
    if file.is_dir() and not any(file.iterdir()):
        raise DataError(f"data.path '{path}' is an empty directory; pass a file or a datasets id.")
    if file.exists() and not file.is_file() and not file.is_dir():
        raise DataError(f"data.path '{path}' is no regular file; every rank must be able to read it: pass a file.")
    if file.is_file():
        rows = _read_file(file)
    elif file.suffix.lower() in _READERS or (path.startswith((".", "/", "~")) and not file.is_dir()):
        raise DataError(f"data.path '{path}' does not exist; pass a {', '.join(_READERS)} file or a datasets id.")
    else:
        rows = _read_dataset(path, split)
    if not rows:
        raise DataError(f"data.path '{path}' holds no rows; there is nothing to score.")
    return rows


def kind_of(value: Any) -> str:
    """Return what a value of a row is, in words that an error can use.

    >>> kind_of(None), kind_of([1])
    ('null', 'a list')
    """
    if value is None:
        return "null"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _read_file(file: Path) -> list[dict[str, Any]]:
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"data.path '{file}' has the ending '{file.suffix}'; known are {', '.join(_READERS)}.")
    try:
        rows = reader(file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}.") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {_one_line(error.strerror or error)}.") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{file}: row {number} is {kind_of(row)}, expected an object with columns.")
    return rows


def _read_jsonl(file: Path) -> list[Any]:
    return [
        _parse(line, file, number) for number, line in enumerate(_text_of(file).split("\n"), start=1) if line.strip()
    ]


def _read_json(file: Path) -> list[Any]:
    text = _text_of(file)
    tree = _parse(text, file, 1) if text.strip() else []
    if isinstance(tree, dict):
        lists = [value for value in tree.values() if isinstance(value, list)]
        tree = lists[0] if len(lists) == 1 else tree
    if not isinstance(tree, list):
        raise DataError(f"{file} holds {kind_of(tree)}, expected a list of rows.")
    return tree


def _read_csv(file: Path) -> list[Any]:
    csv.field_size_limit(sys.maxsize)  # the default refuses a document of 128 KiB
    rows = []
    with file.open(newline="", encoding="utf-8-sig") as handle:
        reader = csv.DictReader(handle, strict=True)
        try:
            header = reader.fieldnames or []
            twice = next((name for name in header if header.count(name) > 1), None)
            if twice is not None:
                raise DataError(f"{file}: line 1: column '{twice}' is there twice; give each column its own name.")
            for row in reader:
                if None in row or None in row.values():
                    count = len(header) + len(row[None]) if None in row else sum(v is not None for v in row.values())
                    raise DataError(
                        f"{file}: line {reader.line_num} has {count} fields, but the header has {len(header)}; quote "
                        "texts that hold commas or line breaks."
                    )
                rows.append(row)
        except csv.Error as error:
            raise DataError(f"{file}: line {reader.reader.line_num} is not CSV: {error}.") from error
    return rows


def _read_parquet(file: Path) -> list[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError("parquet files need the package 'pyarrow': pip install 'plop-dist[train]'") from error
    try:
        return pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is not a whole parquet file: {_one_line(error)}.") from error


def _read_txt(file: Path) -> list[Any]:
    return [{"text": line} for line in _text_of(file).split("\n") if line.strip()]


def _text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8-sig")  # some editors write a byte-order mark


def _parse(text: str, file: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{file}: line {line} is not JSON: {error.msg} at column {error.colno}.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested as deep
        raise DataError(f"{file}: line {first_line} is not JSON that can be read: {_one_line(error)}.") from error


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet, ".txt": _read_txt}


def _read_dataset(name: str, split: str) -> list[dict[str, Any]]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"data.path '{name}' is not a file, and a datasets id needs: pip install 'plop-dist[train]'"
        ) from error
    config = None
    identifier = name
    if ":" in name:  # openai/gsm8k:main
        identifier, config = name.split(":", 1)
    try:
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs as an error is in the exception too
        return [dict(row) for row in datasets.load_dataset(identifier, config, split=split)]
    except Exception as error:  # the hub client raises a dozen kinds; the user needs the one sentence
        raise DataError(
            f"data.path '{name}' is neither a file nor a dataset that can be loaded (split '{split}'): "
            f"{_one_line(error.__cause__ or error)}."
        ) from as_cause(error)


def _one_line(error: object) -> str:
    return " ".join(without_advice(str(error)).split()).rstrip(".") or type(error).__name__
