"""What headers say is what safetensors itself reads, and a damaged file is refused by name without being read."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from plop_dist.checkpoints.safetensors_headers import INDEX_FILE, WEIGHTS_FILE, StoredTensor, read_headers
from plop_dist.errors import ModelError
from tests.models import save_tiny

TENSORS = {"a.weight": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16), "c": torch.tensor(1.0)}


def write_single(folder: Path) -> Path:
    save_file(TENSORS, folder / WEIGHTS_FILE, {"format": "pt"})
    return folder / WEIGHTS_FILE


def edit_header(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(edit(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_one_file(tmp_path: Path) -> None:
    assert read_headers(tmp_path) is None
    write_single(tmp_path)
    assert read_headers(tmp_path) == {
        "a.weight": StoredTensor("F32", (3, 5)),
        "b": StoredTensor("BF16", (7,)),
        "c": StoredTensor("F32", ()),
    }


def test_shards(tmp_path: Path) -> None:
    save_tiny("qwen3_moe", tmp_path, shard_size="40KB")
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    expected = {}
    for file in files:
        with safe_open(file, "pt") as handle:
            expected |= {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    headers = read_headers(tmp_path)
    assert headers is not None
    assert {name: stored.shape for name, stored in headers.items()} == expected


def swap_sizes(header: dict[str, Any]) -> None:
    header["a.weight"]["shape"] = [3, 4]


def overlap(header: dict[str, Any]) -> None:
    header["b"]["data_offsets"] = [0, 14]


def no_place(header: dict[str, Any]) -> None:
    del header["c"]["data_offsets"]


def truths(header: dict[str, Any]) -> None:
    header["a.weight"]["shape"] = [True, 15]


def negative(header: dict[str, Any]) -> None:
    header["a.weight"]["shape"] = [-3, -5]


def a_list(header: dict[str, Any]) -> Any:
    return [1]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (swap_sizes, "with a wrong dtype, shape or place of 'a.weight'"),
        (overlap, "whose tensors do not lie end to end"),
        (no_place, "with a wrong dtype, shape or place of 'c'"),
        (truths, "with a wrong dtype, shape or place of 'a.weight'"),
        (negative, "with a wrong dtype, shape or place of 'a.weight'"),
        (a_list, "that is no JSON object"),
    ],
)
def test_a_header_that_cannot_be(tmp_path: Path, edit: Callable[[Any], Any], message: str) -> None:
    path = write_single(tmp_path)
    edit_header(path, edit)
    with pytest.raises(ModelError, match=rf"'{re.escape(str(path))}' has a header {message}"):
        read_headers(tmp_path)
    with pytest.raises(SafetensorError):
        safe_open(path, "pt")


@pytest.mark.parametrize("kept", [0, 7, 8, 30, -1])
def test_a_file_that_is_cut_off_is_refused_as_safetensors_does(tmp_path: Path, kept: int) -> None:
    path = write_single(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=rf"'{re.escape(str(path))}'.* is cut off"):
        read_headers(tmp_path)
    with pytest.raises(SafetensorError):
        safe_open(path, "pt")


def test_a_file_that_goes_on(tmp_path: Path) -> None:
    path = write_single(tmp_path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ModelError, match="goes on behind its last tensor"):
        read_headers(tmp_path)


def lose(folder: Path, index: dict[str, Any]) -> None:
    (folder / sorted(set(index["weight_map"].values()))[1]).unlink()


def name_another(folder: Path, index: dict[str, Any]) -> None:
    index["weight_map"]["model.more"] = index["weight_map"]["model.norm.weight"]


def no_map(folder: Path, index: dict[str, Any]) -> None:
    index["weight_map"] = []


def no_name(folder: Path, index: dict[str, Any]) -> None:
    index["weight_map"]["model.norm.weight"] = {"a": 1}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose, r"names \d+ files, of which 1 is missing, e\.g\. 'model-00002-of"),
        (name_another, "holds 'model.more', but it does not"),
        (no_map, "has no weight_map"),
        (no_name, "expected the name of a file"),
    ],
)
def test_an_index_that_does_not_fit(tmp_path: Path, damage: Callable[..., None], message: str) -> None:
    save_tiny("llama", tmp_path, shard_size="40KB")
    path = tmp_path / INDEX_FILE
    index = json.loads(path.read_text())
    damage(tmp_path, index)
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        read_headers(tmp_path)
