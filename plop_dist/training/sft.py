"""Supervised fine-tuning in the layout that scored: TRL for one rank and ZeRO, our loop elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plop_dist.config.schema import Config
from plop_dist.registry import BACKENDS, TRAINING_ENGINES, load
from plop_dist.training.trl.common import (
    Log,
    LogCallback,
    adapted_model,
    last_checkpoint,
    save_adapter,
    saving_to,
    trainer_arguments,
)
from plop_dist.values.placement import Placement

_NUM_TOKENS = "num_tokens"


def train(config: Config, placement: Placement, log: Log) -> dict[str, Any]:
    """Train the placement's adapters; returns held_out_before, held_out_after, num_steps, adapter.

    Collective over all ranks. Raises UserError for what a layout cannot train.
    """
    name = load(BACKENDS, config.parallel.backend).training_engine(config)
    return load(TRAINING_ENGINES, name)(config, placement, log)


def train_with_trl(config: Config, placement: Placement, log: Log) -> dict[str, Any]:
    """Train with TRL's SFTTrainer, for one rank and ZeRO; see train."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from plop_dist.backends.hf.load import load_tokenizer
    from plop_dist.training.data import TrainingData
    from plop_dist.training.loop import model_inputs
    from plop_dist.training.trl.track import add_tracker

    tokenizer = load_tokenizer(config.model)
    data = TrainingData(config, tokenizer)
    directory = config.run_path / "train" / "checkpoints"
    resume = last_checkpoint(directory, config, placement)
    arguments = SFTConfig(
        **trainer_arguments(config, directory),
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
    )
    model = adapted_model(config, placement)
    # The places in our own order of rows, which the micro-batches of all ranks take in turn: that of every engine.
    train, replicas = config.train, dist.get_world_size() if dist.is_initialized() else 1
    per_step = train.micro_batch_size * train.gradient_accumulation_steps * replicas
    dataset = Dataset.from_dict({"position": range(train.max_steps * per_step)})

    def collate(rows: Sequence[dict[str, int]]) -> dict[str, Any]:
        batch = data.micro_batch([row["position"] for row in rows])
        inputs = {name: value for name, value in model_inputs(batch).items() if name != "use_cache"}
        return {**inputs, "labels": batch["labels"], _NUM_TOKENS: batch["attention_mask"].sum()}

    class Trainer(SFTTrainer):
        """Counts tokens without padding, packed or not."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.state.num_input_tokens_seen += int(self.accelerator.gather(inputs.pop(_NUM_TOKENS)).sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    held_out: dict[str, float] = {}
    mark = directory / "held_out_before.txt"

    class HeldOut(TrainerCallback):
        """Measures the held-out loss with the engine that trains, once it exists and after the last step."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                held_out["before"] = _held_out_loss(trainer, data.held_out)
                if dist_rank() == 0:
                    mark.write_text(repr(held_out["before"]))
            else:  # resumed: the untrained model was measured by the run that was cut off
                held_out["before"] = float(mark.read_text())

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            held_out["after"] = _held_out_loss(trainer, data.held_out)

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[LogCallback(log), HeldOut()],
    )
    add_tracker(trainer, config, placement, tokenizer, log)
    trainer.remove_callback(PrinterCallback)  # it prints the dictionaries that our log already holds
    with saving_to(directory):
        trainer.train(resume_from_checkpoint=resume)
    adapter = config.run_path / "train" / "adapter"
    save_adapter(trainer, adapter)
    return {
        "held_out_before": held_out["before"],
        "held_out_after": held_out["after"],
        "num_steps": trainer.state.global_step,
        "adapter": str(adapter),
    }


def dist_rank() -> int:
    """Return the global rank, 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


class _TrlEngine:
    """The Trainer's engine as loop.evaluate reads it: all ranks are replicas."""

    def __init__(self, trainer: Any) -> None:
        self._model = trainer.model_wrapped
        self.dp_rank = dist_rank()
        self.dp_size = dist.get_world_size() if dist.is_initialized() else 1
        self.dp_group = dist.group.WORLD if self.dp_size > 1 else None
        self.device = trainer.args.device

    def sum_loss(self, micro_batches: Sequence[dict[str, Tensor]]) -> float:
        from plop_dist.training.loop import model_inputs, sum_token_losses

        was_training = self._model.training
        self._model.eval()
        with torch.no_grad():
            losses = [
                sum_token_losses(self._model(**model_inputs(batch)).logits, batch["labels"]) for batch in micro_batches
            ]
        self._model.train(was_training)
        return float(sum(losses))


def _held_out_loss(trainer: Any, held_out: Sequence[dict[str, Tensor]]) -> float:
    from plop_dist.training.loop import evaluate

    return evaluate(_TrlEngine(trainer), held_out)  # type: ignore[arg-type]
