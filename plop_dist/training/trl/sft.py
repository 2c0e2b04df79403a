"""Supervised fine-tuning with TRL's SFTTrainer, on the same rows in the same order as the step loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from datasets import Dataset
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]  # TRL exports them lazily

from plop_dist.backends.hf.load import load_tokenizer
from plop_dist.config.schema import Config
from plop_dist.training.batch import model_inputs
from plop_dist.training.data import count_rows
from plop_dist.training.engine import Data, Log
from plop_dist.training.image_data import training_data
from plop_dist.training.trl.callbacks import HeldOutCallback, LogCallback
from plop_dist.training.trl.checkpoints import checkpoints_of, finish, last_checkpoint
from plop_dist.training.trl.setup import adapted_model, adapters_kept, trainer_arguments
from plop_dist.training.trl.track import TrackCallback
from plop_dist.values.placement import Placement

_NUM_TOKENS = "num_tokens"
_POSITION = "position"


def train(config: Config, placement: Placement, log: Log, data: Data | None = None) -> dict[str, Any]:
    """Train the placement's adapters; returns held_out_before, held_out_after, num_steps, adapter. See TrainingEngine.

    Collective over all ranks.
    """
    tokenizer = load_tokenizer(config.model)
    if data is None:
        data = training_data(config, tokenizer)
    resume = last_checkpoint(config, placement)
    arguments = SFTConfig(
        **trainer_arguments(config),
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
    )
    model = adapted_model(config, placement)
    with adapters_kept(model):
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=_positions(config),
            data_collator=Collator(data, config.train.micro_batch_size),
            processing_class=tokenizer,
            callbacks=[LogCallback(log)],
        )
    held_out = HeldOutCallback(trainer, data.held_out, checkpoints_of(config) / "held_out_before.txt")
    trainer.add_callback(held_out)
    if config.train.track_nfn_every is not None:
        trainer.add_callback(TrackCallback(trainer, config, placement, tokenizer, log))
    adapter = finish(trainer, config, resume)
    return {
        "held_out_before": held_out.before,
        "held_out_after": held_out.after,
        "num_steps": trainer.state.global_step,
        **count_rows(data, config, trainer.state.global_step),
        "adapter": str(adapter),
    }


class Trainer(SFTTrainer):
    """Counts tokens without padding, packed or not."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return SFTTrainer's loss of a Collator's batch. Collective over the world."""
        counts: Any = self.accelerator.gather(inputs.pop(_NUM_TOKENS))
        self.state.num_input_tokens_seen += int(counts.sum())
        return super().compute_loss(model, inputs, *args, **kwargs)


@dataclass(frozen=True)
class Collator:
    """Looks up the micro-batch whose rows' places the Trainer hands over.

    size: rows per micro-batch, the place p being in the micro-batch p // size of the run.
    """

    data: Data
    size: int

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Any]:
        """Return the model's inputs, labels and the number of tokens."""
        index = rows[0][_POSITION] // self.size
        positions = [row[_POSITION] for row in rows]
        assert positions == list(range(index * self.size, (index + 1) * self.size)), positions
        batch = self.data.micro_batch(index)
        inputs = {name: value for name, value in model_inputs(batch).items() if name != "use_cache"}
        return {**inputs, "labels": batch["labels"], _NUM_TOKENS: batch["attention_mask"].sum()}


def _positions(config: Config) -> Dataset:
    """Return the places of all rows of the run: accelerate deals micro-batches to ranks in turn, as the loop does."""
    train, num_replicas = config.train, dist.get_world_size() if dist.is_initialized() else 1
    per_step = train.micro_batch_size * train.gradient_accumulation_steps * num_replicas
    return Dataset.from_dict({_POSITION: range(train.max_steps * per_step)})
