"""GRPO as it is compared: the reward of one completion of each held-out row, sampled with the same noise in every arm.

One for each row: with as many completions as there is time for, more rows say more than several of one row.
"""

# R held-out rows

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from plop_dist.backends.hf.load import load_tokenizer
from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError, DataError
from plop_dist.registry import SAMPLERS, load
from plop_dist.training.data import RowSet, check_prompts, ids_of_prompts, prompts_of, split_rows
from plop_dist.training.engine import RewardedEngine
from plop_dist.training.grpo.advantages import total_rewards
from plop_dist.training.grpo.checks import check_layout, sampler_name
from plop_dist.training.grpo.rating import Rater
from plop_dist.training.grpo.rollout import Rollouts
from plop_dist.training.grpo.train import GRPORun
from plop_dist.training.rewards import Reward, load_rewards
from plop_dist.training.samplers.sampler import Prompt

# Noise is keyed by seed and generation: that of the held-out rows is no training's, whose generations begin at 0.
_SEED, _GENERATION = 0, -1
_LEAST_MARGIN = 0.01
_OF_SAMPLING = 0.5  # what a step costs beside its completions


def check_rewarded(config: Config) -> None:
    """Raise ConfigError for what keeps rewards from being compared; reads and loads nothing."""
    train = config.train
    if train.engine not in ("auto", "plop"):
        raise ConfigError(
            f"compare takes the steps of a training itself, but train.engine is '{train.engine}', which has a loop of "
            "its own; use train.engine=auto."
        )
    if sampler_name(config) != "model":
        raise ConfigError(
            f"compare has every arm's completions sampled with the same noise, which train.sampler "
            f"'{sampler_name(config)}' does not take; use train.sampler=model, without train.vllm.url."
        )
    check_layout(config)


class HeldOutReward:
    """See method.Method."""

    measure, sign = "held-out reward", -1

    def __init__(self, config: Config) -> None:
        self._config, self._tokenizer = config, load_tokenizer(config.model)
        self._rows, self._held_out = split_rows(config)
        self._rewards = _rewards_of(self._rows, config)
        self._prompts = prompts_of(self._rows, config.train, self._tokenizer)
        self._held_out_rewards = _rewards_of(self._held_out, config)
        self._held_out_prompts = prompts_of(self._held_out, config.train, self._tokenizer)
        self._prompt_ids = ids_of_prompts(self._rows, self._prompts, self._tokenizer)
        self._ids = ids_of_prompts(self._held_out, self._held_out_prompts, self._tokenizer)
        for row_set, prompt_ids in ((self._rows, self._prompt_ids), (self._held_out, self._ids)):
            check_prompts(config, row_set, prompt_ids)
        self.targets_R = np.ones(len(self._ids))

    def stepper(self, engine: RewardedEngine, config: Config) -> Callable[[int], dict[str, Any]]:
        """Return what takes a step. See Method."""
        sampler = load(SAMPLERS, sampler_name(config))(engine, config, self._tokenizer)
        rater = Rater(self._rewards, self._rows, self._prompts, config.reward_seconds, engine.dp_rank)
        rollouts = Rollouts(engine, sampler, rater, config, self._prompt_ids, self._tokenizer)
        return GRPORun(engine, rollouts, config).step

    def values(self, engine: RewardedEngine, half: int) -> list[float]:
        """Return each row's reward. See Method. Raises DataError for a row that no reward rates."""
        config = self._config.model_copy(update={"train": self._config.train.model_copy(update={"seed": _SEED})})
        sampler = load(SAMPLERS, sampler_name(config))(engine, config, self._tokenizer)
        rater = Rater(
            self._held_out_rewards, self._held_out, self._held_out_prompts, config.reward_seconds, engine.dp_rank
        )
        # Beside each other those of one length, which generate together; as many at a time as a training step has.
        rows = sorted(range(half, len(self._ids), 2), key=lambda row: (len(self._ids[row]), row))
        size = _completions_per_step(config)
        found: dict[int, float] = {}
        for start in range(0, len(rows), size):
            found |= self._rewards_of_rows(engine, sampler, rater, rows[start : start + size])
        return [found[row] for row in sorted(found)]

    def least_margin(self, values: Sequence[Sequence[float]]) -> float:
        """Return a hundredth of the span of all rewards: of right and wrong answers one in a hundred. See Method."""
        every = [value for row in values for value in row]
        return _LEAST_MARGIN * (max(every) - min(every))

    def measurements_in(self, config: Config, dp_size: int) -> float:
        """Return what the steps take beside one measurement: most of it is sampling. See Method."""
        train = config.train
        of_step = _completions_per_step(config) * (1 / train.num_iterations + _OF_SAMPLING)
        return train.max_steps * of_step / len(self._ids)

    def _rewards_of_rows(self, engine: RewardedEngine, sampler: Any, rater: Rater, rows: list[int]) -> dict[int, float]:
        num_rows = len(rows)
        # Every replica has as many: the last row fills up.
        rows = rows + [rows[-1]] * (-num_rows % engine.dp_size)
        places = range(engine.dp_rank, len(rows), engine.dp_size)
        own = [rows[place] for place in places]
        made = [done.ids for done in sampler.sample([Prompt(self._ids[row], row) for row in own], _GENERATION)]
        texts = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in made]
        rewards, _ = rater.rate(places, own, made, texts)
        totals = total_rewards(rewards, self._config.train.reward_weights)[:num_rows].tolist()
        unrated = next((row for row, total in zip(rows, totals, strict=False) if total != total), None)
        if unrated is not None:
            raise DataError(
                f"{self._held_out.data.path}: held-out row {self._held_out.first + unrated}: none of train.rewards "
                f"({', '.join(rater.names)}) has rated its completion, but arms are compared on the same rows; add a "
                "reward that rates it, or leave the row out."
            )
        return dict(zip(rows, totals, strict=False))


def _completions_per_step(config: Config) -> int:
    train = config.train
    return train.micro_batch_size * train.gradient_accumulation_steps * config.parallel.dp


def _rewards_of(row_set: RowSet, config: Config) -> Mapping[str, Reward]:
    try:
        return load_rewards(config.train.rewards, row_set.rows, config.train.answer_field, first=row_set.first)
    except DataError as error:
        raise DataError(f"{row_set.data.path}: {error}") from error
