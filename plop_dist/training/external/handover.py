"""How a run is handed to a GRPO engine that runs by itself: the export, rows and a launch script, from one object each.

What an engine asks for stands in its own file, as an ExternalEngine; EXTERNAL_ENGINES of the registry names it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from plop_dist import ranks
from plop_dist.backends.hf.load import load_tokenizer
from plop_dist.config.schema import Config
from plop_dist.data.texts import Row
from plop_dist.errors import ConfigError, DataError, RunDirError
from plop_dist.exporters.text import hydra_overrides
from plop_dist.exporters.write import write_export
from plop_dist.training.data import prompts_of, split_rows
from plop_dist.training.engine import Data, Log
from plop_dist.training.rewards import load_rewards
from plop_dist.values.files import write_text
from plop_dist.values.placement import Placement


class ExternalEngine(Protocol):
    """What differs between the engines."""

    name: str  # the value of train.engine, the export target, and the folder below RUN_DIR/train
    note: str  # what the user should know besides, or nothing

    def home(self) -> Path | None:
        """Return the directory from which launch.sh runs here, or None where it cannot: it is not installed."""
        ...

    def write_rows(
        self, directory: Path, split: str, rows: Sequence[Row], prompts: Sequence[str], config: Config
    ) -> None:
        """Write one split, train or held_out, as the engine reads it. Raises RunDirError."""
        ...

    def launch(self, config: Config, directory: Path, is_megatron: bool) -> tuple[list[str], dict[str, Any]]:
        """Return the command, and the fields that it is given as Hydra overrides besides the export's.

        directory: where write_rows wrote, absolute. is_megatron: whether the engine is to train with Megatron.
        """
        ...


@dataclass(frozen=True)
class HandedOver:
    """An external engine as a training engine: it is written to, and trains once these ranks have gone."""

    engine: ExternalEngine
    methods: tuple[str, ...] = ("grpo",)

    def train(self, config: Config, placement: Placement, log: Log, data: Data | None = None) -> dict[str, Any]:
        """Write RUN_DIR/train/ENGINE: the export, train and held_out rows, launch.sh; return the summary.

        Nothing is trained yet: where the engine is installed the summary holds a job, which the driver starts once
        these ranks have given up their devices (pipeline.run). Rank 0 writes; collective over all ranks. Raises
        ExportError for a placement that the engine cannot express, ConfigError for a layout it has no words for,
        DataError for rows without an answer, RunDirError where the engine would go on from what lies there.
        """
        assert data is None, "data holds micro-batches with labels, and an engine of its own reads rows"
        _check(config, self.engine.name)
        directory = config.run_path / "train" / self.engine.name
        script = directory / "launch.sh"
        ranks.agree(lambda: _write(config, placement, self.engine, directory, script))
        return _summary(self.engine, script)


def megatron_sizes(config: Config) -> dict[str, int]:
    """Return the layout under Megatron's own names."""
    parallel = config.parallel
    return {
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "context_parallel_size": parallel.cp,
        "expert_model_parallel_size": parallel.ep,
    }


def completions_per_step(config: Config) -> int:
    """Return how many completions one optimizer step sees, over all replicas."""
    return config.train.micro_batch_size * config.train.gradient_accumulation_steps * config.parallel.dp


def prompts_per_step(config: Config) -> int:
    """Return how many prompts these are completions of."""
    return max(1, completions_per_step(config) // config.train.num_generations)


def _check(config: Config, name: str) -> None:
    parallel, reference = config.parallel, config.references.get("model.name_or_path")
    if reference is not None:
        raise ConfigError(
            f"train.engine is '{name}', whose launch.sh names the model, but model.name_or_path is {reference}, whose "
            "value is not written down; write out what it is."
        )
    if config.model.checkpoint is not None:
        raise ConfigError(
            f"train.engine is '{name}', which reads Hugging Face weights, but model.checkpoint is "
            f"'{config.model.checkpoint}'; convert it and pass the result as model.name_or_path, without "
            "model.checkpoint."
        )
    if parallel.backend != "megatron" and (parallel.tp > 1 or parallel.pp > 1):
        raise ConfigError(
            f"train.engine is '{name}' with parallel.backend '{parallel.backend}', tp {parallel.tp} and pp "
            f"{parallel.pp}; only parallel.backend=megatron hands tp and pp over to it."
        )


def _write(config: Config, placement: Placement, engine: ExternalEngine, directory: Path, script: Path) -> None:
    left = directory / "checkpoints"
    if left.is_dir() and any(left.iterdir()):
        raise RunDirError(
            f"'{left}' holds checkpoints of an earlier job, from which {engine.name} would go on: it unpickles them. "
            f"Delete that folder to begin anew, or go on with sh {shlex.quote(str(script))} if they are your own."
        )
    is_megatron = config.parallel.backend == "megatron"
    kind = "megatron" if is_megatron else None
    export = write_export(placement, engine.name, directory.parent, engine=kind, widen=config.export.widen)
    train, tokenizer = config.train, load_tokenizer(config.model)
    for split, row_set in zip(("train", "held_out"), split_rows(config), strict=True):
        load_rewards(train.rewards, row_set.rows, train.answer_field)
        for number, row in row_set.numbered():
            if train.answer_field not in row:
                raise DataError(
                    f"row {number} has no column '{train.answer_field}'; set train.answer_field to the answers' column."
                )
        engine.write_rows(directory, split, row_set.rows, prompts_of(row_set, train, tokenizer), config)
    command, fields = engine.launch(config, directory.resolve(), is_megatron)
    lines = [shlex.join(command), *export.flags, *hydra_overrides(fields)]
    write_text(script, "#!/bin/sh\nexec " + " \\\n    ".join(lines) + ' "$@"\n')


def _summary(engine: ExternalEngine, script: Path) -> dict[str, Any]:
    home = engine.home()
    summary: dict[str, Any] = {"engine": engine.name, "num_steps": 0, "launch": str(script)}
    if home is None:
        note = (
            f"nothing was trained: {engine.name} is not installed here; run sh {shlex.quote(str(script))} where it is."
        )
    else:
        note = f"{engine.name} trains in a Ray job of its own, whose log follows."
        summary["job"] = {"script": str(script.resolve()), "directory": str(home)}
    return {**summary, "note": " ".join(filter(None, (note, engine.note)))}
