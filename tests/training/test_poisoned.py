"""Going on from a training whose checkpoints somebody has put code into: it is said, and none of it runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plop_dist.checkpoints.resumable import check_resumable
from plop_dist.errors import RunDirError
from plop_dist.training.checkpoint import Checkpoints, fingerprint
from plop_dist.training.train import train as run_training
from tests import payloads
from tests.models import save_tiny, tiny
from tests.spawn import run_ranks
from tests.training.cases import make_placement
from tests.training.test_sft import make_config

STEPS = {"max_steps": 4, "save_steps": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training with TRL that has left its checkpoints of steps 2 and 4."""
    directory = tmp_path_factory.mktemp("trained")
    save_tiny("llama", directory / "model")
    run_training(make_config(directory, "run", rows=4, train=STEPS), make_placement(tiny("llama")), lambda entry: None)
    return directory


def _sub_adapter(folder: Path, marker: Path) -> None:
    """An adapter in a folder of its own: a Trainer loads it by its configuration, whose modules older PEFT imports."""
    shutil.copytree(folder, folder / "other", ignore=shutil.ignore_patterns("*.pt*"))
    tree = json.loads((folder / "adapter_config.json").read_text())
    tree |= {"megatron_config": {"x": 1}, "megatron_core": "antigravity"}
    (folder / "other" / "adapter_config.json").write_text(json.dumps(tree))


def _elsewhere(folder: Path, marker: Path) -> None:
    """DeepSpeed's files, of which `latest` names some that lie outside the folder."""
    payloads.torch_file(folder.parent / "global_step9" / "mp_rank_00_model_states.pt", marker)
    (folder / "global_step4").mkdir()
    (folder / "latest").write_text("../global_step9")


def _linked(folder: Path, marker: Path) -> None:
    (folder / "optimizer.pt").unlink()
    (folder / "optimizer.pt").symlink_to(payloads.torch_file(folder.parent / "elsewhere.pt", marker))


def _raw(folder: Path, marker: Path) -> None:
    (folder / "rng_state_1.pth").write_bytes(payloads.call("posix", "mkdir", str(marker)))
    # Such files are damaged ones, of which the Trainer reads none; under another ending they would pass as whole.
    (folder / "rng_state_1.pth").rename(folder / "rng_state.npz")


ATTACKS: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "optimizer": (lambda folder, marker: payloads.poison(folder / "optimizer.pt", marker), "objects of 'os.makedirs'"),
    "scheduler": (lambda folder, marker: payloads.poison(folder / "scheduler.pt", marker), "objects of 'os.makedirs'"),
    "rng": (lambda folder, marker: payloads.poison(folder / "rng_state.pth", marker), "objects of 'os.makedirs'"),
    "adapter": (lambda folder, marker: payloads.torch_file(folder / "adapter_model.bin", marker), "pickled objects of"),
    "old format": (
        lambda folder, marker: payloads.torch_file(folder / "adapter_model.bin", marker, is_zip=False), "is a pickle",
    ),
    "deepspeed": (
        lambda folder, marker: payloads.torch_file(folder / "global_step4" / "mp_rank_00_model_states.pt", marker),
        "mp_rank_00_model_states.pt' holds pickled objects of 'os.makedirs'",
    ),
    "latest": (_elsewhere, r"latest' names '\.\./global_step9'"),
    "link": (_linked, "optimizer.pt' is a link"),
    "raw": (_raw, "rng_state.npz' is a pickle"),
    "sub-adapter": (_sub_adapter, "other' is a folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_a_trainers_checkpoint_with_code_in_it_is_not_loaded(trained: Path, tmp_path: Path, name: str) -> None:
    attack, said = ATTACKS[name]
    shutil.copytree(trained, tmp_path / "job")
    config = make_config(tmp_path / "job", "run", rows=4, train=STEPS)
    folder = config.run_path / "train" / "checkpoints" / "checkpoint-4"
    placement = make_placement(tiny("llama"))
    # The copy lies elsewhere, which makes it another model's run.
    (folder.parent / "depends_on.txt").write_text(fingerprint(config, placement))
    attack(folder, tmp_path / "marker")
    with pytest.raises(RunDirError, match=rf"{said}.*, which no trainer leaves there; nothing of .* was loaded"):
        run_training(config, placement, lambda entry: None)
    assert not (tmp_path / "marker").exists()


@pytest.mark.slow
def test_the_trainers_pickled_arguments_are_neither_read_nor_passed_on(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "job")
    config, placement = make_config(tmp_path / "job", "run", rows=4, train=STEPS), make_placement(tiny("llama"))
    folder = config.run_path / "train" / "checkpoints" / "checkpoint-4"
    file = payloads.torch_file(folder / "training_args.bin", tmp_path / "marker")
    assert payloads.fires(tmp_path / "marker", lambda: torch.load(file, weights_only=False))
    run_training(config, placement, lambda entry: None)
    assert not (tmp_path / "marker").exists()
    assert not (config.run_path / "train" / "adapter" / "training_args.bin").exists()


def test_our_own_checkpoints_with_code_in_them_are_not_loaded(tmp_path: Path) -> None:
    checkpoints, marker = Checkpoints(tmp_path / "own", "key"), tmp_path / "marker"
    state = {"adapters": [torch.ones(2)], "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}}
    for step in (1, 2):
        checkpoints.save(step, state, {"held_out_before": 1.0})
    last = checkpoints.load_last()
    assert last is not None
    assert last[0] == 2
    file = payloads.poison(tmp_path / "own" / "step-00000002" / "rank-00000.pt", marker)
    assert payloads.fires(marker, lambda: torch.load(file, weights_only=False))
    with pytest.raises(RunDirError, match=r"rank-00000.pt' holds pickled objects of 'os.makedirs', which no trainer"):
        checkpoints.load_last()
    assert not marker.exists()
    file.write_bytes(file.read_bytes()[:100])  # cut off, on the other hand, is passed over
    last = checkpoints.load_last()
    assert last is not None
    assert last[0] == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_folder_of_another_users_is_said_to_be(tmp_path: Path) -> None:
    payloads.torch_file(tmp_path / "step" / "rank-00000.pt", tmp_path / "marker")
    os.chown(tmp_path / "step", 65534, 65534)
    with pytest.raises(RunDirError, match=r"nothing of '.*step', which belongs to 'nobody', was loaded"):
        check_resumable(tmp_path / "step")


def _zero3(rank: int, directory: str) -> tuple[list[str], list[int]]:
    """Return what is said of poisoned files, looked at first and not, and the steps of going on without the poison."""
    from plop_dist.training.trl import checkpoints

    root, layout = Path(directory), {"backend": "deepspeed", "dp": 2, "zero_stage": 3}
    config, placement = make_config(root, "run", rows=4, train=STEPS, **layout), make_placement(tiny("llama"))
    run_training(config, placement, lambda entry: None)
    folder, said = config.run_path / "train" / "checkpoints" / "checkpoint-2", []
    if rank == 0:
        shutil.rmtree(folder.with_name("checkpoint-4"))
        shutil.copytree(folder, root / "whole")
        for file in folder.glob("global_step2/*_model_states.pt"):
            payloads.poison(file, root / "marker")
            assert payloads.fires(root / "marker", lambda file=file: torch.load(file, weights_only=False))
    torch.distributed.barrier()
    for look in (check_resumable, lambda folder: None):
        checkpoints.check_resumable = look
        try:
            run_training(config, placement, lambda entry: None)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        torch.distributed.barrier()
    checkpoints.check_resumable = check_resumable
    if rank == 0:
        shutil.rmtree(folder)
        shutil.copytree(root / "whole", folder)
    torch.distributed.barrier()
    log: list[dict[str, Any]] = []
    run_training(config, placement, log.append)
    return said, [entry["step"] for entry in log]


@pytest.mark.slow
def test_deepspeeds_checkpoint_with_code_in_it_is_not_loaded(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    make_config(tmp_path, "run", rows=4)
    for (looked, not_looked), steps in run_ranks(2, _zero3, str(tmp_path)):
        assert "_model_states.pt' holds pickled objects of 'os.makedirs', which no trainer leaves there" in looked
        assert not_looked.startswith("UnpicklingError: Weights only load failed")  # torch itself does not load it
        assert steps == [3, 4]
    assert not (tmp_path / "marker").exists()
