"""Reinforcement learning with TRL's GRPOTrainer: groups of completions that the model in training generates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]  # TRL exports them lazily

from plop_dist import ranks
from plop_dist.backends.hf.load import load_tokenizer
from plop_dist.config.schema import Config
from plop_dist.data.texts import token_ids
from plop_dist.errors import ConfigError
from plop_dist.training import rewards
from plop_dist.training.data import RowSet, check_prompts, ids_of_prompts, prompts_of, split_rows
from plop_dist.training.engine import Data, Log
from plop_dist.training.grpo.checks import check_fills_a_step, check_trl, sampler_name
from plop_dist.training.loop import StepRefusedError
from plop_dist.training.reward_calls import checked
from plop_dist.training.trl.callbacks import LogCallback
from plop_dist.training.trl.checkpoints import finish, last_checkpoint
from plop_dist.training.trl.setup import adapted_model, adapters_kept, trainer_arguments
from plop_dist.training.trl.track import TrackCallback
from plop_dist.values.placement import Placement

_ROW = "row"  # the data set's column that leads from a prompt to its row


def train(config: Config, placement: Placement, log: Log, data: Data | None = None) -> dict[str, Any]:
    """Train the adapters for reward; returns reward_first, reward_last, num_steps, adapter. See TrainingEngine.

    Prompts and rewards are those of the configured rows. Collective over all ranks.
    """
    assert data is None, "data holds micro-batches with labels, and GRPO reads rows"
    check_trl(config)
    settings = config.train
    row_set, _ = split_rows(config)
    check_fills_a_step(config, row_set, "trl")
    own = rewards.load_rewards(settings.rewards, row_set.rows, settings.answer_field)
    tokenizer = load_tokenizer(config.model)
    prompts = prompts_of(row_set, settings, tokenizer)
    prompt_ids = ids_of_prompts(row_set, prompts, tokenizer)
    check_prompts(config, row_set, prompt_ids)
    functions = trl_rewards(row_set, prompts, own, config.reward_seconds)
    asked = as_tokenized_by_default(row_set, prompts, prompt_ids, tokenizer)
    resume = last_checkpoint(config, placement)
    arguments = _arguments(config)
    history = rewards.RewardHistory(log)
    model = adapted_model(config, placement)
    with adapters_kept(model):
        trainer = GRPOTrainer(
            model=model,
            args=arguments,
            reward_funcs=functions,
            train_dataset=Dataset.from_dict({"prompt": asked, _ROW: list(range(len(asked)))}),
            processing_class=tokenizer,
            callbacks=[LogCallback(history)],
        )
    if settings.track_nfn_every is not None:
        trainer.add_callback(TrackCallback(trainer, config, placement, tokenizer, log))
    adapter = finish(trainer, config, resume)
    return {**history.summary(), "num_steps": trainer.state.global_step, "adapter": str(adapter)}


def as_tokenized_by_default(
    row_set: RowSet, prompts: Sequence[str], prompt_ids: Sequence[list[int]], tokenizer: Any
) -> Sequence[str]:
    """Return texts that have the prompts' tokens where the tokenizer adds its special ones, as TRL lets it.

    A chat template has written them into a chat already, and a beginning of text would stand there twice. Raises
    ConfigError where no text has just these tokens.
    """
    if row_set.data.messages_field is None:
        return prompts
    plain = row_set.data.model_copy(update={"messages_field": None})
    begins = tokenizer.bos_token or ""
    for texts in (prompts, [prompt.removeprefix(begins) for prompt in prompts]):
        if token_ids(texts, plain, tokenizer, first=row_set.first) == prompt_ids:
            return texts
    raise ConfigError(
        f"data.messages_field is '{row_set.data.messages_field}', and the tokenizer adds special tokens to a chat that "
        "its template has written whole, so that TRL would ask something else than was scored; use train.engine=plop."
    )


def trl_rewards(
    row_set: RowSet, prompts: Sequence[str], own: Mapping[str, rewards.Reward], timeout_s: float | None = None
) -> list[Any]:
    """Return the rewards as TRL calls them: it hands over the rows' indices, they see the rows' prompts and columns.

    Every rank rates its own completions. Collective over all ranks, which raise StepRefusedError alike.
    """
    rows, columns = row_set.rows, rewards.columns_of(row_set.rows)

    def adapt(name: str, reward: rewards.Reward) -> Callable[..., list[float | None]]:
        call = checked(name, reward, timeout_s)

        def on_rows(completions: Sequence[str], **given: Any) -> list[float | None]:
            chosen = [rows[index] for index in given[_ROW]]
            asked = [prompts[index] for index in given[_ROW]]
            numbers = [row_set.first + index for index in given[_ROW]]
            own, failed = list[float | None](), None
            try:
                own = call(asked, completions, numbers, **{key: [row.get(key) for row in chosen] for key in columns})
            except ConfigError as error:
                failed = str(error)
            first = next((text for text in ranks.gathered(failed) if text is not None), None)
            if first is not None:
                raise StepRefusedError(first)
            return own

        on_rows.__name__ = name
        return on_rows

    return [adapt(name, reward) for name, reward in own.items()]


def _arguments(config: Config) -> GRPOConfig:
    train = config.train
    arguments = {
        **trainer_arguments(config),
        "num_generations": train.num_generations,
        "max_completion_length": train.max_completion_length,
        "temperature": train.temperature,
        "loss_type": train.loss_type,
        "num_iterations": train.num_iterations,
        "beta": train.beta,
        "epsilon": train.epsilon,
        "epsilon_high": train.epsilon_high,
        "importance_sampling_level": train.importance_sampling_level,
        "scale_rewards": train.scale_rewards,
        "reward_weights": train.reward_weights,
    }
    if sampler_name(config) == "vllm":
        arguments |= {
            "use_vllm": True,
            "vllm_mode": train.vllm.mode,
            "vllm_server_base_url": train.vllm.url,
            "vllm_server_timeout": train.vllm.timeout_s,
            "vllm_tensor_parallel_size": train.vllm.tensor_parallel_size,
            "vllm_gpu_memory_utilization": train.vllm.gpu_memory_utilization,
            "vllm_max_model_length": train.vllm.max_model_len,
        }
    return GRPOConfig(**arguments)
