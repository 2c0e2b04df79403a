"""The families of Megatron-Bridge, each in a process of its own, with Megatron's own layers and the GPU's."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from plop_dist.backends.megatron.families import check_family
from plop_dist.config.loading import parse_config
from plop_dist.errors import UserError
from tests.sweep.family import Family, Outcome, sweep_family
from tests.te_on_cpu.install import install

SPECIFICATIONS = ("local", "transformer_engine")
# Megatron takes Transformer Engine there whatever is asked, and CUDA does not survive a fork.
HAS_GPU = torch.cuda.device_count() > 0
_TIME_LIMIT_S = 120


def bridge_classes() -> list[str]:
    """Return the classes of models that Megatron-Bridge is registered for."""
    return sorted(_bridge().AutoBridge.list_supported_models())


def sweep_specifications(chosen: Mapping[str, str]) -> list[Family]:
    """Return a row for each class name -> model type of transformers, "" where transformers has none."""
    rows: dict[str, dict[str, Outcome]] = {name: {} for name in chosen}
    context = multiprocessing.get_context("spawn")
    for specification in SPECIFICATIONS[HAS_GPU:]:
        reader, writer = context.Pipe(duplex=False)
        worker = context.Process(target=_swept, args=(specification, dict(chosen), writer))
        worker.start()
        writer.close()  # so that its end is seen here
        for name in chosen:
            rows[name][specification] = reader.recv()
            print(f"{specification:20} {name}: {rows[name][specification]}", flush=True)
        worker.join()
    return [Family(model_type, name, rows[name]) for name, model_type in chosen.items()]


def _bridge() -> Any:
    return importlib.import_module("plop_dist.backends.megatron.bridge").import_bridge()


def _swept(specification: str, chosen: dict[str, str], writer: Any) -> None:
    """Send the outcome of every class. Bridge is imported once; what a family sets for its process ends with it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    context = multiprocessing.get_context("spawn" if HAS_GPU else "fork")
    if not HAS_GPU:
        if specification == "transformer_engine":
            install()
        _bridge()
    for class_name, model_type in chosen.items():
        inner, outer = context.Pipe(duplex=False)
        child = context.Process(target=_one, args=(model_type, class_name, outer))
        child.start()
        outer.close()
        try:
            writer.send(inner.recv())
        except EOFError:
            child.join()
            writer.send(Outcome("crashed", f"the process ended with {child.exitcode}"))
        child.join()


def _one(model_type: str, class_name: str, writer: Any) -> None:
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(_TIME_LIMIT_S)
    if not model_type:
        writer.send(_by_name(class_name))
        return
    with tempfile.TemporaryDirectory() as folder:
        row = sweep_family(model_type, class_name, Path(folder), "megatron")
    (outcome,) = row.ways.values()
    writer.send(_by_name(class_name) if outcome.verdict == "not built" else outcome)


def _by_name(class_name: str) -> Outcome:
    """Return what is said of a checkpoint of a class that is not in transformers, or not to be had small."""
    tree = {"model": {"name_or_path": "model"}, "data": {"path": "builtin:random"}, "parallel": {"backend": "megatron"}}
    try:
        check_family(SimpleNamespace(architectures=[class_name]), parse_config(tree))
    except UserError as error:
        return Outcome("refused", f"{type(error).__name__}: {error}")
    return Outcome("wrong", "it cannot be built here and is not refused")


def _too_long(number: int, frame: Any) -> None:
    raise TimeoutError(f"not done in {_TIME_LIMIT_S} seconds")
