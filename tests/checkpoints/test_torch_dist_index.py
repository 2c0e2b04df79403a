"""The index of a torch.distributed checkpoint is read as data: nothing it names is called, whatever name it goes by."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from plop_dist.checkpoints.safe_pickle import tensors_only
from plop_dist.checkpoints.torch_dist_index import check_index, indexes_checked
from plop_dist.errors import ModelError, first_line
from tests import payloads


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of tensors of several kinds, and of one entry of bytes."""
    state = {"weight": torch.ones(2, 3), "half": torch.ones(4, dtype=torch.bfloat16), "steps": 7}
    dcp.save(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    return tmp_path / "saved"


def test_what_torch_writes_is_let_through(saved: Path) -> None:
    check_index(saved)


@pytest.mark.parametrize(("module", "name"), payloads.DISGUISES)
def test_no_name_leads_to_a_function(tmp_path: Path, module: str, name: str) -> None:
    marker = tmp_path / "marker"
    index = tmp_path / ".metadata"
    index.write_bytes(payloads.call(module, name, str(marker)))
    assert payloads.fires(marker, lambda: pickle.loads(index.read_bytes()))
    with pytest.raises(ModelError, match=rf"its index \(\.metadata\) would run {module}\.{name} when it is read"):
        check_index(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["Path", "os", "FileSystemReader", "pickle", "_split_by_size_and_type"])
def test_other_names_of_the_same_modules_are_refused(tmp_path: Path, name: str) -> None:
    module = "torch.distributed.checkpoint.filesystem"
    (tmp_path / ".metadata").write_bytes(payloads.call(module, name))
    with pytest.raises(ModelError, match=rf"would run {module}\.{name}"):
        check_index(tmp_path)


def test_entries_of_bytes_are_loaded_as_tensors_or_not_at_all(saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    payloads.poison_entries(saved, marker, only=lambda key: key == "steps")

    def load() -> None:
        dcp.load({"steps": 0}, checkpoint_id=saved, no_dist=True)

    assert payloads.fires(marker, load)
    with tensors_only(), pytest.raises(BaseException, match="CheckpointException") as caught:
        load()
    failure = caught.value.failures[0][0]  # type: ignore[attr-defined]
    assert first_line(failure).endswith("objects other than tensors, which are never unpickled")
    assert not marker.exists()


def test_the_users_own_switch_is_put_back_and_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    marker = tmp_path / "marker"
    file = payloads.torch_file(tmp_path / "trap.pt", marker)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert payloads.fires(marker, lambda: torch.load(file))
    with tensors_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=False)
    assert not marker.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_an_index_that_is_exchanged_after_it_was_checked_is_not_run(saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with indexes_checked():
        dcp.load({"weight": torch.zeros(2, 3)}, checkpoint_id=saved, no_dist=True)
    (saved / ".metadata").write_bytes(payloads.call("torch", "os.mkdir", str(marker)))

    def load() -> None:
        dcp.load({"weight": torch.zeros(2, 3)}, checkpoint_id=saved, no_dist=True)

    with indexes_checked(), pytest.raises(BaseException, match=r"torch\.os\.mkdir"):
        load()
    assert not marker.exists()
    assert payloads.fires(marker, load)  # torch reads as before again
