"""DeepSpeed's checkpoints as model.checkpoint: every file of them is read as tensors, and none of its code runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from plop_dist.checkpoints.deepspeed import find_weights
from plop_dist.checkpoints.resumable import check_resumable
from plop_dist.checkpoints.safe_pickle import load_mapped
from plop_dist.errors import ModelError, RunDirError
from tests import payloads
from tests.models import tiny


@pytest.fixture
def universal(tmp_path: Path) -> Path:
    """A universal checkpoint of a tiny model, laid out as ds_to_universal does."""
    states = dict(tiny("llama").state_dict())
    folder = tmp_path / "job" / "global_step2_universal"
    for name, tensor in states.items():
        (folder / "zero" / name).mkdir(parents=True)
        torch.save({"param": tensor}, folder / "zero" / name / "fp32.pt")
    torch.save({"module": states, "shared_params": {}}, folder / "mp_rank_00_model_states.pt")
    (folder.parent / "latest_universal").write_text(folder.name)
    return folder


def test_a_universal_checkpoint_is_read(universal: Path) -> None:
    model = tiny("llama", seed=1)
    found = find_weights(universal.parent, model, frozenset())
    assert torch.equal(found["lm_head.weight"] + 0, tiny("llama").lm_head.weight)


@pytest.mark.parametrize("name", ["zero/lm_head.weight/fp32.pt", "mp_rank_00_model_states.pt"])
def test_a_universal_checkpoint_runs_nothing(universal: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    file = payloads.poison(universal / name, marker)
    assert payloads.fires(marker, lambda: torch.load(file, weights_only=False))
    with pytest.raises(ModelError, match=rf"{file.name}' holds pickled objects of 'os\.makedirs'.*it was not opened"):
        find_weights(universal.parent, tiny("llama"), frozenset())
    assert not marker.exists()


def test_the_folder_to_be_read_lies_inside(universal: Path) -> None:
    shutil.copytree(universal, universal.parents[1] / "elsewhere")
    (universal.parent / "latest_universal").write_text("../elsewhere")
    with pytest.raises(ModelError, match=r"'latest_universal' holds '\.\./elsewhere', expected the name of a folder"):
        find_weights(universal.parent, tiny("llama"), frozenset())


@pytest.mark.parametrize(("module", "name"), payloads.DISGUISES)
@pytest.mark.parametrize("old", [True, False])
def test_no_name_leads_to_a_function(tmp_path: Path, module: str, name: str, old: bool) -> None:
    """Names of DeepSpeed's and transformers' are let through to stand-ins, so nothing is called by them either."""
    marker = tmp_path / "marker"
    file = payloads.archive(tmp_path / "step" / "rank-00000.pt", payloads.call(module, name, str(marker), old=old))
    assert payloads.fires(marker, lambda: torch.load(file, weights_only=False))
    if old and module.startswith(("deepspeed", "transformers")):
        assert type(load_mapped(file)).__name__ == "_StandIn"
    else:
        with pytest.raises(ModelError, match=r"have no place in a checkpoint|cut off or not a file of torch"):
            load_mapped(file)
    with pytest.raises(RunDirError, match=r"rank-00000.pt' (holds pickled objects of|is an archive, but none of)"):
        check_resumable(tmp_path / "step")
    assert not marker.exists()
