"""Cases of damaged model folders: one file cut, edited, exchanged or lost, and the commands that read the folder."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.inputs import Case
from tests.fuzz.mutations import NUMBERS, TEXTS, json_text, mutated, mutated_text, odd_value


def folder_case(model: Path, config: Path, rng: Random) -> Case:
    """Damage the model folder that a configuration names, then check it and score it."""
    for _ in range(rng.choice((1, 1, 1, 2))):
        rng.choice(_EDITS)(model, rng)
    commands = [("check", str(config)), ("score", str(config))]
    return Case(tuple(rng.choice((commands, commands[:1], commands[1:]))))


def _weights(model: Path, rng: Random) -> Path | None:
    files = sorted(path for path in model.glob("*.safetensors") if path.is_file())
    return rng.choice(files) if files else None


def _cut_bytes(model: Path, rng: Random) -> None:
    path = _any_file(model, rng)
    if path is not None:
        path.write_bytes(mutated_text(path.read_bytes(), rng))


def _lose(model: Path, rng: Random) -> None:
    path = _any_file(model, rng)
    if path is not None:
        path.unlink()


def _make_folder(model: Path, rng: Random) -> None:
    path = _any_file(model, rng)
    if path is not None:
        path.unlink()
        path.mkdir()


def _exchange(model: Path, rng: Random) -> None:
    """Copy one file over another, as a wrong download does."""
    path, other = _any_file(model, rng), _any_file(model, rng)
    if path is not None and other is not None and path != other:
        shutil.copy(other, path)


def _shard_cut(model: Path, rng: Random) -> None:
    path = _weights(model, rng)
    if path is not None:
        content = path.read_bytes()
        path.write_bytes(content[: rng.randrange(len(content))])


def _header_edited(model: Path, rng: Random) -> None:
    """Rewrite a safetensors header: names, shapes, dtypes, offsets, or the header's own length."""
    path = _weights(model, rng)
    if path is None:
        return
    content = path.read_bytes()
    if len(content) < 8:
        return
    (length,) = struct.unpack("<Q", content[:8])
    if rng.random() < 0.15:
        odd = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", odd) + content[8:])
        return
    try:
        header = json.loads(content[8 : 8 + length])
    except ValueError:
        return
    header = rng.choice(_HEADER_EDITS)(header, rng) if isinstance(header, dict) and header else header
    text = json_text(header)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def _renamed(header: Any, rng: Random) -> Any:
    name = rng.choice(list(header))
    header[rng.choice((f"model.{name}", name.removeprefix("model."), f"{name}.x", *TEXTS))] = header.pop(name)
    return header


def _lost(header: Any, rng: Random) -> Any:
    for name in rng.sample(list(header), rng.choice((1, len(header) // 2 + 1))):
        del header[name]
    return header


def _entry_edited(header: Any, rng: Random) -> Any:
    entry = header[rng.choice(list(header))]
    if isinstance(entry, dict):
        shape = entry.get("shape")
        entry.update(
            rng.choice(
                (
                    {"shape": odd_value(rng)},
                    {"shape": shape[::-1] if isinstance(shape, list) else shape},
                    {"shape": [rng.choice(NUMBERS), rng.choice(NUMBERS)]},
                    {"shape": []},
                    {"dtype": rng.choice(("I64", "BOOL", "F8_E4M3", "F64", "BF16", "X", *TEXTS))},
                    {"data_offsets": odd_value(rng)},
                    {"data_offsets": [0, 4]},
                    {"data_offsets": [rng.choice(NUMBERS), rng.choice(NUMBERS)]},
                )
            )
        )
    return header


_HEADER_EDITS: tuple[Callable[[Any, Random], Any], ...] = (_renamed, _lost, _entry_edited, _entry_edited, mutated)


def _index_edited(model: Path, rng: Random) -> None:
    path = model / "model.safetensors.index.json"
    if not path.is_file():
        _header_edited(model, rng)
        return
    path.write_bytes(json_text(mutated(json.loads(path.read_text()), rng)))


def _json_edited(model: Path, rng: Random) -> None:
    files = sorted(path for path in model.glob("*.json") if path.is_file() and "index" not in path.name)
    if files:
        path = rng.choice([*files, model / "config.json"])
        if path.is_file():
            _edit(path, rng)


def _config_field(model: Path, rng: Random) -> None:
    """Change one field of config.json, so that the others do not hide it."""
    path = model / "config.json"
    if path.is_file():
        _edit(path, rng, one_field=True)


def _edit(path: Path, rng: Random, *, one_field: bool = False) -> None:
    try:
        tree = json.loads(path.read_text())
    except ValueError:
        return
    if one_field and isinstance(tree, dict):
        tree[rng.choice([*tree, *_CONFIG_FIELDS])] = odd_value(rng)
    else:
        tree = mutated(tree, rng)
    path.write_bytes(json_text(tree))


_CONFIG_FIELDS = (
    "quantization_config", "auto_map", "architectures", "model_type", "dtype", "torch_dtype", "tie_word_embeddings",
    "num_hidden_layers", "vocab_size", "hidden_size", "layer_types", "rope_parameters", "text_config",
)  # fmt: skip


def _any_file(model: Path, rng: Random) -> Path | None:
    files = sorted(path for path in model.iterdir() if path.is_file())
    return rng.choice(files) if files else None


_EDITS: tuple[Callable[[Path, Random], None], ...] = (
    _cut_bytes, _cut_bytes, _lose, _make_folder, _exchange, _shard_cut, _shard_cut, _header_edited, _header_edited,
    _header_edited, _index_edited, _index_edited, _json_edited, _json_edited, _config_field, _config_field,
)  # fmt: skip
