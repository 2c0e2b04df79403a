"""The GRPO run: completions of the training rows' prompts, and steps on them, on any engine that trains for reward."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

from plop_dist.backends.hf.load import load_tokenizer
from plop_dist.config.schema import Config
from plop_dist.registry import SAMPLERS, load
from plop_dist.training.batch import to_device
from plop_dist.training.data import check_prompts, ids_of_prompts, prompts_of, split_rows
from plop_dist.training.engine import Log, RewardedEngine
from plop_dist.training.grpo.checks import sampler_name
from plop_dist.training.grpo.loss import GRPOObjective
from plop_dist.training.grpo.rating import Rater
from plop_dist.training.grpo.rollout import Rollout, Rollouts
from plop_dist.training.loop import learning_rate_at, run_steps, save_adapter, seed_dropout
from plop_dist.training.rewards import RewardHistory, load_rewards
from plop_dist.training.sums import sum_over
from plop_dist.values.placement import Placement


def train(
    open_engine: Callable[[Config, Placement], Any], config: Config, placement: Placement, log: Log
) -> dict[str, Any]:
    """Train the adapters for reward; returns reward_first, reward_last, num_steps, adapter. See TrainingEngine.

    open_engine: makes the layout's RewardedEngine. Prompts and rewards are those of the configured rows. Collective
    over all ranks.
    """
    settings = config.train
    row_set, _ = split_rows(config)
    rewards = load_rewards(settings.rewards, row_set.rows, settings.answer_field)
    tokenizer = load_tokenizer(config.model)
    prompts = prompts_of(row_set, settings, tokenizer)
    prompt_ids = ids_of_prompts(row_set, prompts, tokenizer)
    check_prompts(config, row_set, prompt_ids)
    new_sampler = load(SAMPLERS, sampler_name(config))
    with (
        closing(open_engine(config, placement)) as engine,
        closing(new_sampler(engine, config, tokenizer)) as sampler,
    ):
        rater = Rater(rewards, row_set, prompts, config.reward_seconds, engine.dp_rank)
        run = GRPORun(engine, Rollouts(engine, sampler, rater, config, prompt_ids, tokenizer), config)
        history = RewardHistory(log)
        progress = run_steps(engine, run, lambda: {}, run.step, config, placement, history)
        adapter = save_adapter(engine, config)
        return {**history.summary(), **progress, "num_steps": settings.max_steps, "adapter": adapter}


class GRPORun:
    """The steps of a run. As Stateful it keeps the generation that the next step still trains on."""

    def __init__(self, engine: RewardedEngine, rollouts: Rollouts, config: Config) -> None:
        self._engine, self._rollouts, self._train = engine, rollouts, config.train
        self._objective = GRPOObjective(config.train)
        self._rollout: Rollout | None = None

    def step(self, number: int) -> dict[str, Any]:
        """Take a step, counted from 0, and return its entry for the log. Collective. Raises StepRefusedError."""
        began, engine = time.perf_counter(), self._engine
        seed_dropout(self._train.seed, number, engine.dp_rank)
        generation, iteration = divmod(number, self._train.num_iterations)
        if iteration == 0 or self._rollout is None:
            self._rollout = self._rollouts.make(generation)
        rollout, rate = self._rollout, learning_rate_at(self._train, number)
        total, grad_norm = engine.step(rollout.micro_batches, 1, rate, self._objective)
        num_tokens = float(sum(int(batch["attention_mask"].sum()) for batch in rollout.micro_batches))
        loss, num_tokens = sum_over(engine.dp_group, total, num_tokens, device=engine.device)
        if iteration + 1 == self._train.num_iterations:
            self._rollout = None
        return {
            "step": number + 1,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            **rollout.entry,
            **self._objective.tally.take(engine.dp_rank),
            "tokens_per_second": num_tokens / (time.perf_counter() - began),
        }

    def state(self) -> dict[str, Any]:
        """Return the engine's part, and the generation's where it is not used up."""
        rollout = self._rollout
        if rollout is None:
            return {"engine": self._engine.optimizer.state(), "rollout": None}
        batches = [{name: tensor.cpu() for name, tensor in batch.items()} for batch in rollout.micro_batches]
        return {
            "engine": self._engine.optimizer.state(),
            "rollout": {"micro_batches": batches, "entry": rollout.entry},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what state() returned."""
        self._engine.optimizer.load_state(state["engine"])
        kept = state["rollout"]
        if kept is not None:
            batches = [to_device(batch, self._engine.device) for batch in kept["micro_batches"]]
            self._rollout = Rollout(batches, kept["entry"])
