"""TRL as a training engine: trainers with a loop of their own, in one process and over replicas at any ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from plop_dist.config.schema import Config
from plop_dist.registry import TRAINING_ENGINES, import_attribute, load
from plop_dist.training.engine import Data, Engine, Log
from plop_dist.training.grpo.checks import check_trl
from plop_dist.values.placement import Placement


@dataclass(frozen=True)
class TRLEngine:
    """SFTTrainer and GRPOTrainer, each imported when it is to train."""

    methods: tuple[str, ...] = ("sft", "grpo")

    def check(self, config: Config) -> None:
        """Raise UserError for what TRL's trainer of train.method cannot do."""
        if config.train.method == "grpo":
            check_trl(config)

    def train(self, config: Config, placement: Placement, log: Log, data: Data | None = None) -> dict[str, Any]:
        """Train with TRL's trainer of train.method. See TrainingEngine."""
        method = config.train.method
        train = import_attribute(f"plop_dist.training.trl.{method}:train", f"train.method {method}")
        return train(config, placement, log, data)

    def opener(self, config: Config) -> Callable[[Config, Placement], Engine]:
        """Return what opens an Engine over the same replicas, whose steps are the same. See Stepwise."""
        return load(TRAINING_ENGINES, "replicas").opener(config)


ENGINE = TRLEngine()
