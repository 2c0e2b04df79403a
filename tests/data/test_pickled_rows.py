"""Data that carries code: none of it runs, and no message says how it could."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from plop_dist.data.rows import load_rows
from plop_dist.errors import DataError
from tests import payloads


def _pickle(folder: Path, marker: Path) -> None:
    (folder / "rows.pkl").write_bytes(pickle.dumps(payloads.Trap(marker)))


def _array(folder: Path, marker: Path) -> None:
    np.save(folder / "rows.npy", np.array([payloads.Trap(marker)], dtype=object), allow_pickle=True)


def _script(folder: Path, marker: Path) -> None:
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    payloads.module(folder / f"{folder.name}.py", marker, "import datasets\n")


def _yaml(folder: Path, marker: Path) -> None:
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    (folder / "README.md").write_text(f"---\nx: !!python/object/apply:os.makedirs ['{marker}']\n---\n")


def _features(folder: Path, marker: Path) -> None:
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    infos = {"default": {"builder_name": "pandas", "features": {"text": {"_type": "os.makedirs"}}}}
    (folder / "dataset_infos.json").write_text(json.dumps(infos))


CASES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "webdataset": (lambda folder, marker: payloads.webdataset(folder / "a.tar", marker), "which are never unpickled"),
    "torch": (lambda folder, marker: payloads.torch_file(folder / "a.pt", marker), "No .* data files"),
    "pickle": (_pickle, "No .* data files"),
    "array": (_array, "No .* data files"),
    "script": (_script, "scripts are no longer supported"),
    "yaml": (_yaml, "could not determine a constructor"),
    "features": (_features, "Feature type 'os.makedirs' not found"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_folder_of_data_runs_nothing(tmp_path: Path, name: str) -> None:
    spoil, said = CASES[name]
    (tmp_path / "data").mkdir()
    spoil(tmp_path / "data", tmp_path / "marker")
    with pytest.raises(DataError, match=said) as caught:
        load_rows(str(tmp_path / "data"))
    assert not (tmp_path / "marker").exists()
    assert "weights_only" not in str(caught.value)


def test_a_caller_is_not_shown_torchs_advice_as_the_cause(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    payloads.webdataset(tmp_path / "data" / "a.tar", tmp_path / "marker")
    part = tmp_path / "part.pth"
    part.write_bytes(payloads.bytes_of(tmp_path / "marker"))
    assert payloads.fires(tmp_path / "marker", lambda: torch.load(part, weights_only=False))
    with pytest.raises(DataError) as caught:
        load_rows(str(tmp_path / "data"))
    assert caught.value.__cause__ is None
