"""Checkpoints written by the trainers' own save functions, at one layout, are read at others."""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from tests.backends.megatron.models import config, fresh, gains, samples, true_gains, worst
from tests.backends.megatron.test_checkpoint import LATENT
from tests.installed import needs_bridge
from tests.models import save_tiny
from tests.spawn import run_ranks

pytestmark = [pytest.mark.slow, needs_bridge]
_BESIDE = ("modelopt", "megatron.energon")
SP = {"tp": 2, "sequence_parallel": True}
# Family, fields, the layout that writes, those that read. A vocabulary of 129 is padded for two ranks.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[dict[str, Any]]]] = {
    "padded": ("llama", {"vocab_size": 129}, {"tp": 2, "pp": 2}, [{"dp": 4}, {"tp": 4}, {"pp": 2, "dp": 2}]),
    "experts": ("qwen3_moe", {}, {"dp": 4, "ep": 2}, [{**SP, "dp": 2, "ep": 4}, {"pp": 2, "dp": 2}]),
    "latent": ("deepseek_v3", LATENT, {**SP, "pp": 2}, [{"dp": 4, "ep": 4}]),
}


def _by_megatron_lm(chunks: list[Any], directory: Path) -> None:
    """Write as pretrain_gpt.py does, without optimizer."""
    from megatron.training import arguments, checkpointing, global_vars

    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    given = ["--save", str(directory), "--no-save-optim", "--no-save-rng", "--ckpt-format", "torch_dist"]
    # What it sets later than its arguments, in a function that asks for CUDA.
    later = {
        "use_dist_ckpt": True,
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    parsed = argparse.Namespace(**later)
    global_vars.set_args(parser.parse_args(given, parsed))
    with _without_cuda_state():
        checkpointing.save_checkpoint(7, chunks, None, None, 0)


def _by_bridge(chunks: list[Any], directory: Path) -> None:
    """Write as Megatron-Bridge's recipes do, without the packages that it imports beside its checkpoints."""
    sys.meta_path.append(_Absent())
    from megatron.bridge.training.model_load_save import save_megatron_model

    with _without_cuda_state():
        save_megatron_model(chunks, directory, ckpt_format="torch_dist")


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for packages that are not installed: quantisation's state, which plain models lack, and data loaders."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        is_asked = any(f"{fullname}.".startswith(f"{package}.") for package in _BESIDE)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if is_asked else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


class _Anything(types.ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda *_, **__: None})


@contextmanager
def _without_cuda_state() -> Iterator[None]:
    """Let the random state of CUDA, which both save beside the weights, be empty."""
    own = torch.cuda.get_rng_state
    torch.cuda.get_rng_state = lambda *_: torch.zeros(0, dtype=torch.uint8)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.cuda.get_rng_state = own


WRITERS: dict[str, Callable[[list[Any], Path], None]] = {"megatron-lm": _by_megatron_lm, "bridge": _by_bridge}


def _job(rank: int, root: Path, writer: str, names: list[str]) -> dict[str, Any]:
    from plop_dist.backends.megatron.backend import load, load_chunks

    found = {}
    for name in names:
        _, _, written, read = CASES[name]
        chunks, _ = load_chunks(config(root / name, **written))
        directory = root / f"{name}-{writer}"
        WRITERS[writer](chunks, directory)
        dist.barrier()
        fresh()
        for layout in read:
            model = load(config(root / f"{name}-other", checkpoint=str(directory), **layout))
            found[f"{name} {layout}"] = gains(model, samples())
            fresh()
    return found


@pytest.mark.parametrize(
    ("writer", "names"),
    [
        ("megatron-lm", ["padded"]),
        pytest.param("megatron-lm", ["experts", "latent"], marks=pytest.mark.rare),
        pytest.param("bridge", list(CASES), marks=pytest.mark.rare),
    ],
)
def test_a_trainers_own_checkpoint_is_read_at_other_layouts(tmp_path: Path, writer: str, names: list[str]) -> None:
    for name in names:
        family, fields, _, _ = CASES[name]
        save_tiny(family, tmp_path / name, **fields)
        save_tiny(family, tmp_path / f"{name}-other", seed=1, **fields)
    truth = {name: true_gains(tmp_path / name, samples()) for name in names}
    for report in run_ranks(4, _job, tmp_path, writer, names):
        assert len(report) == sum(len(CASES[name][3]) for name in names)
        for case, found in report.items():
            error, where = worst(found, truth[case.partition(" ")[0]])
            assert error < 1e-5, f"{case}: {where} is off by {error}"
