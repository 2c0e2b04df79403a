"""Which engine continues the run: the one whose layout scored, TRL, or one that runs by itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError
from plop_dist.exporters.task_type import task_type
from plop_dist.registry import BACKENDS, EXTERNAL_ENGINES, TRAINING_ENGINES, import_attribute, load, names
from plop_dist.training.engine import Data, Log, TrainingEngine
from plop_dist.values.placement import Placement
from plop_dist.values.scores import ModelInfo, Projection

if TYPE_CHECKING:
    from plop_dist.training.external.handover import HandedOver


def train(config: Config, placement: Placement, log: Log, data: Data | None = None) -> dict[str, Any]:
    """Train the placement's adapters by train.method, and return the summary.

    Of sft: held_out_before, held_out_after, num_steps, adapter, and what data.count_rows says. Of grpo: reward_first
    and reward_last instead of the losses; or, with an engine that runs by itself, what was written for it.
    data: replaces the configured rows (sft).
    Collective over all ranks. Raises UserError for what a layout cannot train.
    """
    name = engine_name(config)
    engine = load_engine(name)
    check_task(config, placement.source.model, placement.chosen)
    if config.train.method not in engine.methods:
        raise ConfigError(
            f"train.method is '{config.train.method}', but the training engine '{name}' knows only "
            f"{', '.join(engine.methods)}; use one of these, or another layout."
        )
    return engine.train(config, placement, log, data)


def check_trainable(config: Config) -> None:
    """Raise UserError for what the training engine of a configuration does not train; reads and loads nothing."""
    engine = load_engine(engine_name(config))
    check = getattr(engine, "check", None)  # an engine of another package may do without
    if check is not None:
        check(config)


def check_task(config: Config, model: ModelInfo, modules: Iterable[Projection]) -> None:
    """Raise ConfigError for a class that is not trained to write the next token, which is what all methods do.

    And for experts in a 3-D parameter that ZeRO-3 has partitioned. modules: those that are, or may be, adapted.
    """
    if task_type(model) != "CAUSAL_LM":
        raise ConfigError(
            f"train.method is {config.train.method}, which trains models to write the next token, but "
            f"'{model.name_or_path}' is a {model.architecture}; set train.method=none, and train it with an export."
        )
    parallel = config.parallel
    stacked = next((module for module in modules if module.storage == "expert_parameter"), None)
    if stacked is not None and parallel.zero_stage == 3 and parallel.world_size > 1:
        raise ConfigError(
            f"train.method is {config.train.method} at parallel.zero_stage 3, but {stacked.type} may be chosen, whose "
            f"experts are parts of '{stacked.holder}', and PEFT sees nothing of a parameter that is partitioned; use "
            "parallel.zero_stage=2, or leave the experts out (placement.experts=false)."
        )


def engine_name(config: Config) -> str:
    """Return the training engine of a configuration: a name in the registry, or an address "module:attribute".

    The backend's record says it of the layout. For grpo train.engine may name another: TRL, plop in its place, or one
    that runs by itself. Raises ConfigError for a layout that the named one does not train.
    """
    parallel, wanted = config.parallel, config.train.engine
    of_layout = load(BACKENDS, parallel.backend).training_engine(config)
    if config.train.method == "sft" or not config.train.is_in_these_ranks:
        return of_layout if config.train.method == "sft" else wanted
    if of_layout is None:
        raise ConfigError(
            f"train.method is grpo, but parallel.backend '{parallel.backend}' trains nothing in this layout; set "
            "train.method=none, and train elsewhere with an export."
        )
    if wanted == "trl" and of_layout != "trl":
        raise ConfigError(
            f"train.engine is 'trl', but parallel.backend is '{parallel.backend}' with tp {parallel.tp} and pp "
            f"{parallel.pp}, which TRL cannot train; use train.engine=plop."
        )
    if wanted == "plop" and of_layout == "trl":
        if parallel.zero_stage:
            raise ConfigError(
                f"train.engine is 'plop' with parallel.zero_stage {parallel.zero_stage}, at which only TRL "
                "trains; use train.engine=trl, or zero_stage=0."
            )
        return "replicas"
    return of_layout


def external_engine(config: Config) -> HandedOver | None:
    """Return what trains in a job of its own, or None where the ranks themselves train. Raises ConfigError."""
    name = engine_name(config)
    return load(EXTERNAL_ENGINES, name) if name in names(EXTERNAL_ENGINES) else None


def load_engine(name: str) -> TrainingEngine:
    """Return the engine of a name or address. Raises ConfigError, MissingExtraError."""
    if ":" in name:
        return import_attribute(name, f"training engine '{name}'")
    return load(EXTERNAL_ENGINES if name in names(EXTERNAL_ENGINES) else TRAINING_ENGINES, name)
