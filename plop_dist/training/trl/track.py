"""The NFN on the way of a TRL trainer, whose PEFT model is whole on every rank or partitioned by ZeRO-3."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from plop_dist.backends.deepspeed.zero import gathered
from plop_dist.backends.hf.load import meta_model
from plop_dist.backends.hf.whole import whole_model
from plop_dist.config.schema import Config
from plop_dist.training.adapters.shards import peft_shards
from plop_dist.training.engine import Log
from plop_dist.training.track import NfnTracker, check, with_head
from plop_dist.values.placement import Placement


class TrackCallback(TrainerCallback):
    """Logs {"step", "nfn": {type: value}} before the first step and after every N-th, on every rank at the same ones.

    trainer: the TRL trainer that this is a callback of.
    """

    def __init__(self, trainer: Any, config: Config, placement: Placement, tokenizer: Any, log: Log) -> None:
        self._trainer, self._config, self._placement = trainer, config, placement
        self._tokenizer, self._log = tokenizer, log
        self._every = config.train.track_nfn_every or 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Make the tracker, now that the trainer's engine exists, and score what training begins with. Collective."""
        self._tracker = self._make()
        if state.global_step == 0:
            self._log({"step": 0, "nfn": self._tracker.score()})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Score after every N-th step. Collective over the world."""
        if state.global_step % self._every == 0:
            self._log({"step": state.global_step, "nfn": self._tracker.score()})

    def _make(self) -> NfnTracker:
        check(self._placement)
        trainer, config = self._trainer, self._config
        has_deepspeed = getattr(trainer.args, "hf_deepspeed_config", None) is not None
        is_partitioned = has_deepspeed and config.parallel.zero_stage == 3
        gather = gathered if is_partitioned else None
        outer = trainer.model_wrapped if is_partitioned else trainer.model
        base = trainer.model.get_base_model()
        model = whole_model(
            base,
            with_head(self._placement),
            gather=gather,
            twin=meta_model(config.model),
            call=outer if is_partitioned else None,
        )
        return NfnTracker(config, self._placement, self._tokenizer, model, peft_shards(base), [outer], gather)
