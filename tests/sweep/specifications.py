"""The families of Megatron-Bridge, in processes of their own: with each specification, the GPU's on two ranks too."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from plop_dist.backends.megatron.families import check_family
from plop_dist.config.loading import parse_config
from plop_dist.errors import UserError
from tests.sweep.family import Family, Outcome, build_and_run, by_command, save, score_saved, tried
from tests.te_on_cpu.install import install

SPECIFICATIONS = ("local", "transformer_engine")
# What is exact with Transformer Engine's layers on one rank is scored on two as well.
LAYOUTS: dict[str, dict[str, Any]] = {"tp2_sp": {"tp": 2, "sequence_parallel": True}, "pp2": {"pp": 2}}
# What checkpoints on the hub call a class -> transformers' name.
PUBLISHED_AS = {"ExaoneMoEForCausalLM": "ExaoneMoeForCausalLM"}
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
            found = reader.recv()
            rows[name] |= found
            print(f"{specification:20} {name}: {found}", flush=True)
        worker.join()
    return [Family(model_type, name, rows[name]) for name, model_type in chosen.items()]


def _bridge() -> Any:
    return importlib.import_module("plop_dist.backends.megatron.bridge").import_bridge()


def _swept(specification: str, chosen: dict[str, str], writer: Any) -> None:
    """Send every class's outcome by way. Bridge is imported once; what a family sets for its process ends with it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    if not HAS_GPU:
        if specification == "transformer_engine":
            install()
        _bridge()
    layouts = LAYOUTS if specification == "transformer_engine" and not HAS_GPU else {}
    for class_name, model_type in chosen.items():
        found = _result(*_start(_one, model_type, class_name, specification, layouts))
        writer.send(found if isinstance(found, dict) else {specification: found})


def _one(model_type: str, class_name: str, specification: str, layouts: dict[str, dict[str, Any]], writer: Any) -> None:
    """Send the outcomes of a class by way: on one rank, and if it is exact there, in the layouts."""
    model = build_and_run(model_type, PUBLISHED_AS.get(class_name, class_name)) if model_type else None
    if model is None or isinstance(model, Outcome):
        writer.send({specification: _by_name(class_name)})
        return
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder), class_name)
        found = {specification: _result(*_start(_one_rank, model, Path(folder), {}, {}))}
        if found[specification].verdict == "exact":
            found |= {way: _on_two_ranks(model, Path(folder), layout) for way, layout in layouts.items()}
    writer.send(found)


def _on_two_ranks(model: Any, folder: Path, layout: dict[str, Any]) -> Outcome:
    """Return what comes of a layout on two ranks: an outcome that is not exact, if a rank has one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        _start(_one_rank, model, folder, layout, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    outcomes = [_result(*rank) for rank in ranks]
    return next((outcome for outcome in outcomes if outcome.verdict != "exact"), outcomes[0])


def _one_rank(model: Any, folder: Path, layout: dict[str, Any], environment: dict[str, str], writer: Any) -> None:
    os.environ |= environment
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(_TIME_LIMIT_S)
    writer.send(tried(lambda: _compared(model, folder, layout)))


def _compared(model: Any, folder: Path, layout: dict[str, Any]) -> Outcome:
    if os.environ.get("RANK", "0") == "0":
        return by_command(model, folder, "megatron", **layout)
    score_saved(folder, "megatron", **layout)
    return Outcome("exact")  # as far as this rank can tell


def _start(function: Callable[..., None], *args: Any) -> tuple[Any, Any]:
    """Start a process that sends one thing, and return it and where that comes out."""
    context = multiprocessing.get_context("spawn" if HAS_GPU else "fork")
    inner, outer = context.Pipe(duplex=False)
    child = context.Process(target=function, args=(*args, outer))
    child.start()
    outer.close()
    return child, inner


def _result(child: Any, inner: Any) -> Any:
    """Return what a process has sent, or the outcome that it crashed."""
    try:
        found = inner.recv()
    except EOFError:
        found = None
    child.join()
    return found or Outcome("crashed", f"the process ended with {child.exitcode}")


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
