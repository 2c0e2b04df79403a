"""One line for a trainer: scored on its own batches, placed, adapted, before its first step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from plop_dist.choose.place import place as place_scores
from plop_dist.errors import ConfigError, LayoutError
from plop_dist.plugin.apply import apply
from plop_dist.plugin.score import score
from plop_dist.values.placement import Placement


def attach(
    trainer: Any,
    k: int = 3,
    *,
    num_samples: int = 128,
    batches: Iterable[Any] | None = None,
    place: Mapping[str, Any] | None = None,
    **lora: Any,
) -> Placement:
    """Put the adapters of a new placement on a trainer's model, and return the placement. Collective over the world.

    trainer: transformers' Trainer or one of TRL's, made and not yet training, in whatever layout it will train (DDP,
    DeepSpeed at any ZeRO stage, FSDP: the model is wrapped only by train()). k: how many module types are adapted.
    num_samples: about how many of its rows are scored, over all ranks. batches: other batches than its own, as
    plop_dist.score takes them. place: further options of plop_dist.place (exclude, policy, rank, ...). lora: options
    of peft.LoraConfig (r, lora_alpha, lora_dropout, ...); without r and lora_alpha the placement's.

    The trainer's data and random states are as before. Raises ConfigError for a trainer that has begun or brings its
    own optimizer or adapters, and for batches that plop_dist.score cannot read; then as score, place and
    Placement.apply.
    """
    _check_trainer(trainer)
    prepared = trainer.accelerator._dataloaders
    num_prepared = len(prepared)
    try:
        scores = score(trainer.model, _own_batches(trainer) if batches is None else batches, num_samples=num_samples)
    finally:
        del prepared[num_prepared:]
    placement = place_scores(scores, k=k, **(place or {}))
    trainer.model = trainer.model_wrapped = apply(placement, trainer.model, **lora)
    if trainer.args.gradient_checkpointing:
        # Else nothing that a checkpointed block is given needs a gradient, and its adapters would get none.
        trainer.model.enable_input_require_grads()
    return placement


def _check_trainer(trainer: Any) -> None:
    for name in ("model", "accelerator", "args", "get_train_dataloader"):
        if not hasattr(trainer, name):
            raise ConfigError(
                f"attach() got a {type(trainer).__name__}, which has no {name}; it takes transformers' Trainer and "
                "those built on it (TRL's). In a loop of your own: plop_dist.score, plop_dist.place, placement.apply."
            )
    if trainer.optimizer is not None:
        raise ConfigError(
            "attach() got a trainer that has an optimizer already, over the parameters of the base model; call attach "
            "before train(), and pass the trainer no optimizers=(the optimizer, ...)."
        )
    if trainer.model_wrapped is not trainer.model:
        raise LayoutError("attach() got a trainer whose model is wrapped already; call attach before train().")


def _own_batches(trainer: Any) -> Iterator[Any]:
    """Yield the trainer's batches of training; the prompts where it generates the rest itself (GRPO)."""
    for batch in trainer.get_train_dataloader():
        if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Mapping) and "prompt" in batch[0]:
            yield _prompt_batch(trainer, [row["prompt"] for row in batch])
        elif isinstance(batch, Mapping) and "input_ids" not in batch:
            raise ConfigError(
                f"attach() cannot score the batches of a {type(trainer).__name__}, which hold {', '.join(batch)} and "
                "no input_ids; give it batches= of dictionaries with input_ids and attention_mask."
            )
        else:
            yield batch


def _prompt_batch(trainer: Any, prompts: list[Any]) -> dict[str, Any]:
    processor = trainer.processing_class
    texts = [
        prompt
        if isinstance(prompt, str)
        else processor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    batch = processor(text=texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
