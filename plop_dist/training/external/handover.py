"""How a run is handed to a GRPO engine that runs by itself: the export, rows and a launch script, from one object each.

What an engine asks for stands in its own file, as an ExternalEngine; EXTERNAL_ENGINES of the registry names it.
"""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from plop_dist import ranks
from plop_dist.backends.hf.load import load_tokenizer
from plop_dist.config.schema import Config
from plop_dist.data.texts import Row
from plop_dist.errors import ConfigError, DataError, RunDirError
from plop_dist.exporters.text import hydra_overrides
from plop_dist.exporters.write import write_export
from plop_dist.training.data import RowSet, ids_of_prompts, prompts_of, split_rows
from plop_dist.training.engine import Data, Log
from plop_dist.training.external.interpreter import Interpreter, interpreter_of
from plop_dist.training.external.nodes import nodes_of
from plop_dist.training.external.prompts import Prompts, chat_template, prompts_for
from plop_dist.training.external.remote_code import check_remote_code
from plop_dist.training.external.train_keys import check_keys
from plop_dist.training.grpo.checks import check_fills_a_step
from plop_dist.training.rewards import load_rewards
from plop_dist.values.files import write_text
from plop_dist.values.placement import Placement

_LEFT = ("adapter", "merged", "converted", "logs", "log.jsonl")  # by a job, and not to be taken for the next one's


@dataclass(frozen=True)
class Launch:
    """What launch.sh holds: an engine's command, with the fields it is given as overrides besides the export's.

    write: fields -> overrides, quoted for a shell. variables: of the environment. afterwards: lines of a shell that run
    once the command has ended well, and leave the adapter where `brought_back` looks for it.
    """

    command: Sequence[str]
    fields: Mapping[str, Any]
    write: Callable[[Mapping[str, Any]], tuple[str, ...]] = hydra_overrides
    variables: Mapping[str, str] = field(default_factory=dict)
    afterwards: Sequence[str] = ()


@dataclass(frozen=True)
class Brought:
    """What a job has left. adapter: the folder with PEFT's two files; log: one entry per step, as engine.Log takes."""

    adapter: Path
    log: list[dict[str, Any]]


class ExternalEngine(Protocol):
    """What differs between the engines."""

    name: str  # the value of train.engine, the export target, and the folder below RUN_DIR/train
    note: str  # what the user should know besides, or nothing
    packages: tuple[str, ...]  # that its Python must have, by import names; the engine's own first
    trusts_all: bool  # whether it runs code that comes with a checkpoint whatever it is told
    reasons: Mapping[str, str]  # why keys of `train` cannot be taken, by key

    def takes(self, is_megatron: bool) -> frozenset[str]:
        """Return the keys of `train` for which it has a word; others are refused where they are given."""
        ...

    def check(self, config: Config, is_megatron: bool) -> None:
        """Raise ConfigError for a value of the keys it takes that it has no word for."""
        ...

    def home(self, interpreter: Interpreter) -> Path | None:
        """Return the directory from which launch.sh runs, or None where what it runs is not there."""
        ...

    def write_rows(self, directory: Path, split: str, rows: Sequence[Row], prompts: Prompts, config: Config) -> None:
        """Write one split, train or held_out, as the engine reads it. Raises RunDirError, DataError."""
        ...

    def launch(self, config: Config, directory: Path, is_megatron: bool, template: str | None) -> Launch:
        """Return what launch.sh holds.

        directory: where write_rows wrote, absolute. is_megatron: whether the engine is to train with Megatron.
        template: the chat template that the prompts need; None: the checkpoint's own.
        """
        ...

    def brought_back(self, directory: Path) -> Brought | None:
        """Return what a job that has ended left in the directory, or None where there is no adapter."""
        ...


@dataclass(frozen=True)
class HandedOver:
    """An external engine as a training engine: it is written to, and trains once these ranks have gone."""

    engine: ExternalEngine
    methods: tuple[str, ...] = ("grpo",)

    def check(self, config: Config) -> Interpreter:
        """Return the engine's Python. Raises ConfigError, LayoutError for what can be told without a model.

        Keys and values that the engine has no word for, a layout, and a train.engine_python without the engine.
        """
        engine, is_megatron = self.engine, config.parallel.backend == "megatron"
        _check_config(config, engine.name)
        check_keys(config, engine.name, engine.takes(is_megatron), engine.reasons)
        engine.check(config, is_megatron)
        nodes_of(config)
        if engine.trusts_all:
            check_remote_code(config, engine.name)
        interpreter = interpreter_of(config, engine.packages)
        if config.train.engine_python is not None and interpreter.missing:
            raise ConfigError(
                f"train.engine_python: {interpreter} lacks {', '.join(interpreter.missing)}, which train.engine "
                f"'{engine.name}' needs; install it there (plop-dist itself too: rewards are called there)."
            )
        return interpreter

    def train(self, config: Config, placement: Placement, log: Log, data: Data | None = None) -> dict[str, Any]:
        """Write RUN_DIR/train/ENGINE: the export, train and held_out rows, launch.sh; return the summary.

        Nothing is trained yet: where the engine is installed the summary holds a job, which the driver starts once
        these ranks have given up their devices (pipeline.run). Rank 0 writes; collective over all ranks. Raises
        ExportError for a placement that the engine cannot express, ConfigError for a layout it has no words for,
        DataError for rows without an answer, RunDirError where the engine would go on from what lies there.
        """
        assert data is None, "data holds micro-batches with labels, and an engine of its own reads rows"
        return ranks.agree(lambda: self._hand_over(config, placement))

    def directory(self, config: Config) -> Path:
        """Return the folder in which everything for the engine, and all that it leaves, lies."""
        return config.run_path / "train" / self.engine.name

    def _hand_over(self, config: Config, placement: Placement) -> dict[str, Any]:
        interpreter = self.check(config)
        directory = self.directory(config)
        script = directory / "launch.sh"
        _write(config, placement, self.engine, directory, script)
        return _summary(self.engine, interpreter, script)


def python_of(config: Config) -> str:
    """Return the interpreter that launch.sh names."""
    return config.train.engine_python or "python3"


def megatron_sizes(config: Config) -> dict[str, int]:
    """Return the layout under Megatron's own names."""
    parallel = config.parallel
    return {
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "context_parallel_size": parallel.cp,
        "expert_model_parallel_size": parallel.ep,
    }


def generation_tp(config: Config) -> int:
    """Return over how many GPUs vLLM cuts the model: as in training, but never over more than one node's."""
    return math.gcd(config.parallel.tp, nodes_of(config)[1])


def completions_per_step(config: Config) -> int:
    """Return how many completions one optimizer step sees, over all replicas."""
    return config.train.micro_batch_size * config.train.gradient_accumulation_steps * config.parallel.dp


def prompts_per_step(config: Config) -> int:
    """Return how many prompts these are completions of."""
    return completions_per_step(config) // config.train.num_generations


def check_rows(config: Config, rows: RowSet, held_out: RowSet, tokenizer: Any) -> None:
    """Raise DataError for what an engine leaves out in silence: prompts over train.max_length, steps not filled."""
    most, name = config.train.max_length, config.train.engine
    check_fills_a_step(config, rows, name)
    for row_set in (rows, held_out):
        lengths = [len(ids) for ids in ids_of_prompts(row_set, prompts_of(row_set, config.train, tokenizer), tokenizer)]
        long = next((number for number, length in enumerate(lengths) if length > most), None)
        if long is not None:
            raise DataError(
                f"{row_set.data.path}: row {row_set.first + long}: the prompt has {lengths[long]} tokens, but "
                f"train.max_length is {most}, and train.engine '{name}' asks none that is longer; set it to "
                f"{max(lengths)}, or leave such rows out."
            )


def _check_config(config: Config, name: str) -> None:
    parallel = config.parallel
    for key in ("model.name_or_path", "train.engine_python"):
        if key in config.references:
            raise ConfigError(
                f"train.engine is '{name}', whose launch.sh names {key}, but that is {config.references[key]}, whose "
                "value is not written down; write out what it is."
            )
    for key in ("checkpoint", "quantization", "auto_class"):
        value = getattr(config.model, key)
        if value not in (None, "AutoModelForCausalLM"):
            raise ConfigError(
                f"train.engine is '{name}', which reads Hugging Face weights by itself, but model.{key} is "
                f"'{value}'; leave it out, or pass a converted model as model.name_or_path."
            )
    if parallel.backend != "megatron" and (parallel.tp > 1 or parallel.pp > 1):
        raise ConfigError(
            f"train.engine is '{name}' with parallel.backend '{parallel.backend}', tp {parallel.tp} and pp "
            f"{parallel.pp}; only parallel.backend=megatron hands tp and pp over to it."
        )
    per_step = completions_per_step(config)
    if per_step % config.train.num_generations:
        raise ConfigError(
            f"train.micro_batch_size * gradient_accumulation_steps * parallel.dp = {per_step} completions per step, "
            f"which train.num_generations = {config.train.num_generations} does not divide; change one of them."
        )


def _write(config: Config, placement: Placement, engine: ExternalEngine, directory: Path, script: Path) -> None:
    left = directory / "checkpoints"
    if left.is_dir() and any(left.iterdir()):
        raise RunDirError(
            f"'{left}' holds checkpoints of an earlier job, from which {engine.name} would go on: it unpickles them. "
            f"Delete that folder to begin anew, or go on with sh {shlex.quote(str(script))} if they are your own."
        )
    for name in _LEFT:
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    is_megatron = config.parallel.backend == "megatron"
    kind = "megatron" if is_megatron else None
    export = write_export(placement, engine.name, directory.parent, engine=kind, widen=config.export.widen)
    train, tokenizer = config.train, load_tokenizer(config.model)
    row_sets = split_rows(config)
    check_rows(config, *row_sets, tokenizer)
    for split, row_set in zip(("train", "held_out"), row_sets, strict=True):
        load_rewards(train.rewards, row_set.rows, train.answer_field, first=row_set.first)
        for number, row in row_set.numbered():
            if train.answer_field not in row:
                raise DataError(
                    f"row {number} has no column '{train.answer_field}'; set train.answer_field to the answers' column."
                )
        engine.write_rows(directory, split, row_set.rows, prompts_for(row_set, config, tokenizer), config)
    launch = engine.launch(config, directory.resolve(), is_megatron, chat_template(config, tokenizer))
    write_text(script, _script(launch, export.flags))


def _script(launch: Launch, flags: Sequence[str]) -> str:
    variables = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in launch.variables.items())
    lines = [shlex.join(launch.command), *flags, *launch.write(launch.fields)]
    afterwards = "".join(f"{line}\n" for line in launch.afterwards)
    return f"#!/bin/sh\nset -e\n{variables}" + " \\\n    ".join(lines) + f' "$@"\n{afterwards}'


def _summary(engine: ExternalEngine, interpreter: Interpreter, script: Path) -> dict[str, Any]:
    home = None if interpreter.missing else engine.home(interpreter)
    summary: dict[str, Any] = {"engine": engine.name, "num_steps": 0, "launch": str(script)}
    if home is None:
        lacks = f" ({interpreter} lacks {', '.join(interpreter.missing)})" if interpreter.missing else ""
        note = (
            f"nothing was trained: {engine.name} is not installed here{lacks}; run sh {shlex.quote(str(script))} where "
            "it is, then plop-dist run again for its adapter, or name its Python in train.engine_python."
        )
    else:
        note = f"{engine.name} trains in a Ray job of its own, whose log follows ({interpreter})."
        summary["job"] = {"script": str(script.resolve()), "directory": str(home)}
    return {**summary, "note": " ".join(filter(None, (note, engine.note)))}
