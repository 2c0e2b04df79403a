"""Reinforcement learning with GRPO in the layout that scored: TRL under ZeRO; Megatron's goes to verl or NeMo-RL."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from plop_dist.config.schema import Config
from plop_dist.data.samples import Row, fill, render
from plop_dist.errors import ConfigError, MissingExtraError
from plop_dist.training import rewards
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

_ROW = "row"  # the data set's column that leads from a prompt to its row


def train(config: Config, placement: Placement, log: Log) -> dict[str, Any]:
    """Train the placement's adapters for reward; returns reward_first, reward_last, num_steps, adapter.

    With train.engine verl or nemo-rl (auto: verl with Megatron) nothing is trained here: the launch configuration is
    written and the summary names it. Collective over all ranks. Raises UserError for what a layout cannot train.
    """
    engine = engine_of(config)
    if engine != "trl":
        return importlib.import_module("plop_dist.training.launch_files").prepare(config, placement, engine)
    check(config)
    return _train_with_trl(config, placement, log)


def engine_of(config: Config) -> str:
    """Return the engine that train.engine stands for. Raises ConfigError for TRL with Megatron."""
    is_megatron = config.parallel.backend == "megatron"
    if config.train.engine == "auto":
        return "verl" if is_megatron else "trl"
    if config.train.engine == "trl" and is_megatron:
        raise ConfigError(
            "train.engine is 'trl', but parallel.backend is 'megatron', which TRL cannot train; use train.engine=verl "
            "or nemo-rl, or parallel.backend=deepspeed."
        )
    return config.train.engine


def check(config: Config) -> None:
    """Raise UserError for what TRL's GRPO cannot do, before any weight is loaded."""
    train, parallel = config.train, config.parallel
    if parallel.tp > 1 or parallel.pp > 1:
        raise ConfigError(
            f"train.method is 'grpo' with parallel.tp {parallel.tp} and parallel.pp {parallel.pp}; TRL trains replicas "
            "only: use parallel.backend=deepspeed with dp and zero_stage, or parallel.backend=megatron with verl."
        )
    if train.packing:
        raise ConfigError("train.packing is true with train.method grpo, which has nothing to pack; set it to false.")
    per_step = train.micro_batch_size * train.gradient_accumulation_steps * parallel.dp
    if per_step % train.num_generations:
        raise ConfigError(
            f"train.micro_batch_size * gradient_accumulation_steps * parallel.dp = {per_step} completions per step, "
            f"which train.num_generations = {train.num_generations} does not divide; change one of them."
        )
    if train.use_vllm and not torch.cuda.is_available():
        raise ConfigError("train.use_vllm is true, but there is no GPU, which vLLM needs; set train.use_vllm=false.")
    if train.use_vllm and importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("train.use_vllm needs the package 'vllm', which is not installed: pip install vllm")


def prompts_of(rows: Sequence[Row], config: Config, tokenizer: Any) -> list[str]:
    """Return each row's prompt: train.prompt_template, or what is scored of it (data.text_field, template).

    Of data.messages_field it is the chat up to its last answer, with the opening of the next one.
    Raises DataError naming the row and the column that is missing.
    """
    data, template = config.data, config.train.prompt_template
    if config.train.data_path is not None:
        data = data.model_copy(update={"path": config.train.data_path})
    if template is not None:
        return [fill(template, row, number, data.path) for number, row in enumerate(rows, start=1)]
    if data.messages_field is None:
        return [render(row, number, data, tokenizer) for number, row in enumerate(rows, start=1)]

    class Opened:
        """The tokenizer's chat template, applied to all but a last answer."""

        def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **_: Any) -> str:
            asked = messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages
            return tokenizer.apply_chat_template(list(asked), tokenize=False, add_generation_prompt=True)

    return [render(row, number, data, Opened()) for number, row in enumerate(rows, start=1)]


def trl_rewards(
    config: Config, rows: Sequence[Row], own: Mapping[str, rewards.Reward]
) -> list[Callable[..., list[float | None]]]:
    """Return the rewards as TRL calls them: it hands over the rows' indices, they see the rows' columns."""
    columns = sorted({key for row in rows for key in row} - {"prompts", "completions"})

    def adapt(name: str, reward: rewards.Reward) -> Callable[..., list[float | None]]:
        call = rewards.checked(name, reward)

        def on_rows(prompts: Sequence[str], completions: Sequence[str], **given: Any) -> list[float | None]:
            chosen = [rows[index] for index in given[_ROW]]
            return call(prompts, completions, **{key: [row.get(key) for row in chosen] for key in columns})

        on_rows.__name__ = name
        return on_rows

    return [adapt(name, reward) for name, reward in own.items()]


def _train_with_trl(config: Config, placement: Placement, log: Log) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    from plop_dist.backends.hf.load import load_tokenizer
    from plop_dist.training.data import split_rows
    from plop_dist.training.trl.track import add_tracker

    train = config.train
    rows, _ = split_rows(config)
    functions = trl_rewards(config, rows, rewards.load_rewards(train.rewards, rows, train.answer_field))
    tokenizer = load_tokenizer(config.model)
    dataset = Dataset.from_dict({"prompt": prompts_of(rows, config, tokenizer), _ROW: list(range(len(rows)))})
    directory = config.run_path / "train" / "checkpoints"
    resume = last_checkpoint(directory, config, placement)
    arguments = GRPOConfig(
        **trainer_arguments(config, directory),
        num_generations=train.num_generations,
        max_completion_length=train.max_completion_length,
        temperature=train.temperature,
        use_vllm=train.use_vllm,
        **({"vllm_mode": "colocate"} if train.use_vllm else {}),
    )
    history: list[float] = []

    def note(entry: dict[str, Any]) -> None:
        if "reward" in entry:  # not where no completion of the step was rated
            history.append(entry["reward"])
        log(entry)

    trainer = GRPOTrainer(
        model=adapted_model(config, placement),
        args=arguments,
        reward_funcs=functions,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[LogCallback(note)],
    )
    add_tracker(trainer, config, placement, tokenizer, log)
    trainer.remove_callback(PrinterCallback)  # it prints the dictionaries that our log already holds
    with saving_to(directory):
        trainer.train(resume_from_checkpoint=resume)
    adapter = config.run_path / "train" / "adapter"
    save_adapter(trainer, adapter)
    unrated = {"note": "train.rewards rated no completion: nothing was learned."} if not history else {}
    return {
        **unrated,
        "reward_first": history[0] if history else None,
        "reward_last": history[-1] if history else None,
        "num_steps": trainer.state.global_step,
        "adapter": str(adapter),
    }
