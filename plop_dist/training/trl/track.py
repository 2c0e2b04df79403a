"""The NFN on the way of a TRL trainer, whose PEFT model is whole on every rank or partitioned by ZeRO-3."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from plop_dist.backends.deepspeed.zero import gathered
from plop_dist.backends.hf.load import meta_model
from plop_dist.backends.hf.whole import whole_model
from plop_dist.config.schema import Config
from plop_dist.training import track
from plop_dist.training.adapters.shards import peft_shards
from plop_dist.training.trl.common import Log
from plop_dist.values.placement import Placement


def add_tracker(trainer: Any, config: Config, placement: Placement, tokenizer: Any, log: Log) -> None:
    """Have a TRL trainer log {"step", "nfn": {type: value}} before the first step and after every N-th, if wanted."""
    every = config.train.track_nfn_every
    if every is None:
        return

    class Track(TrainerCallback):
        """Scores once the engine exists, on every rank at the same steps."""

        tracker: track.NfnTracker

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.tracker = _tracker(trainer, config, placement, tokenizer)
            if state.global_step == 0:
                log({"step": 0, "nfn": self.tracker.score()})

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % every == 0:
                log({"step": state.global_step, "nfn": self.tracker.score()})

    trainer.add_callback(Track())


def _tracker(trainer: Any, config: Config, placement: Placement, tokenizer: Any) -> track.NfnTracker:
    track.check(placement)
    is_partitioned = getattr(trainer.args, "hf_deepspeed_config", None) is not None and config.parallel.zero_stage == 3
    gather = gathered if is_partitioned else None
    outer = trainer.model_wrapped if is_partitioned else trainer.model
    base = trainer.model.get_base_model()
    model = whole_model(
        base,
        track.with_head(placement),
        gather=gather,
        twin=meta_model(config.model),
        call=outer if is_partitioned else None,
    )
    return track.NfnTracker(config, placement, tokenizer, model, peft_shards(base), [outer], gather)
