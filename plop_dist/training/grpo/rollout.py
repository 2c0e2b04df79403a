"""One generation: prompts, their completions, what these are worth, as the micro-batches that steps train on."""

# b completions of a micro-batch, s tokens of the longest

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plop_dist.config.schema import Config
from plop_dist.training.adapters.shards import AdapterShard
from plop_dist.training.batch import IGNORED, Batch, to_device
from plop_dist.training.data import Endless
from plop_dist.training.engine import RewardedEngine
from plop_dist.training.grpo.advantages import advantages_of, deviations, total_rewards
from plop_dist.training.grpo.loss import token_weights
from plop_dist.training.grpo.metrics import Tally, add_sampler
from plop_dist.training.grpo.rating import Rater
from plop_dist.training.logits import Logits, next_tokens
from plop_dist.training.loop import micro_batch_indices
from plop_dist.training.samplers.sampler import Completion, Prompt, Sampler

_MOST_IMPORTANCE = 3.0


@dataclass(frozen=True)
class Rollout:
    """This replica's micro-batches of one generation, and what is logged of all replicas' completions."""

    micro_batches: list[Batch]
    entry: dict[str, float]


class Rollouts:
    """Makes the generations of a run: each has the completions of one optimizer step, over all replicas.

    prompt_ids: of each training row.
    """

    def __init__(
        self, engine: RewardedEngine, sampler: Sampler, rater: Rater, config: Config,
        prompt_ids: Sequence[list[int]], tokenizer: Any,
    ) -> None:  # fmt: skip
        self._engine, self._sampler, self._rater = engine, sampler, rater
        self._train, self._dp = config.train, config.parallel.dp
        self._ids = prompt_ids
        self._tokenizer, self._tally = tokenizer, Tally()
        per_step = self._train.micro_batch_size * self._train.gradient_accumulation_steps * self._dp
        self._order = Endless(range(len(prompt_ids)), self._train.seed, per_step // self._train.num_generations)

    def make(self, generation: int) -> Rollout:
        """Return the rollout of a generation, counted from 0. Collective over all ranks. Raises StepRefusedError."""
        train, engine = self._train, self._engine
        size, accumulation = train.micro_batch_size, train.gradient_accumulation_steps
        rows = [row for row in self._order.rows_of(generation) for _ in range(train.num_generations)]
        own = micro_batch_indices(0, accumulation, engine.dp_rank, engine.dp_size)
        places = [place for index in own for place in range(index * size, (index + 1) * size)]
        prompts = [Prompt(self._ids[rows[place]], place) for place in places]
        completions = self._sampler.sample(prompts, generation)
        texts = [self._tokenizer.decode(completion.ids, skip_special_tokens=True) for completion in completions]
        tokens = [completion.ids for completion in completions]
        rewards, lengths = self._rater.rate(places, [rows[place] for place in places], tokens, texts)
        totals = total_rewards(rewards, train.reward_weights)
        advantages = advantages_of(totals, train)
        batches = [
            self._batch(prompts[start : start + size], completions[start : start + size], advantages, sum(lengths))
            for start in range(0, len(prompts), size)
        ]
        self._read_policies(batches, completions)
        metrics = self._tally.take(engine.dp_rank)
        return Rollout(batches, {**self._entry(rewards, totals, lengths), **metrics})

    def _batch(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], advantages: Tensor, num_tokens: int
    ) -> Batch:
        train, longest = self._train, max(len(p.ids) + len(c.ids) for p, c in zip(prompts, completions, strict=True))
        shape = (len(prompts), longest)
        ids_bs = torch.full(shape, self._tokenizer.pad_token_id)
        attention_bs, labels_bs = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
        mask_bs, advantages_bs = torch.zeros(shape), torch.zeros(shape)
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            begin, end = len(prompt.ids), len(prompt.ids) + len(completion.ids)
            ids_bs[index, :end], attention_bs[index, :end] = torch.tensor(prompt.ids + completion.ids), 1
            labels_bs[index, begin:end] = torch.tensor(completion.ids)
            mask_bs[index, begin - 1 : end - 1] = 1
            advantages_bs[index, begin - 1 : end - 1] = advantages[prompt.row]
        weights_bs = token_weights(train, mask_bs, train.gradient_accumulation_steps * self._dp, num_tokens)
        batch = {"input_ids": ids_bs, "attention_mask": attention_bs, "labels": labels_bs, "weights": weights_bs,
                 "advantages": advantages_bs, "position_ids": torch.arange(longest).repeat(shape[0], 1)}  # fmt: skip
        return to_device(batch, self._engine.device)

    def _read_policies(self, batches: Sequence[Batch], completions: Sequence[Completion]) -> None:
        """Add to the micro-batches what other policies than the one in training say of their tokens.

        `old`: the one that training begins this generation with, where that is not the first step's own answer;
        `reference`: the model without adapters; `importance`: old / sampler, where another program has sampled.
        """
        engine, train = self._engine, self._train
        is_foreign = completions[0].log_probabilities is not None
        if train.num_iterations > 1 or is_foreign:
            for batch, old in zip(batches, engine.read_logits(batches, self._log_probabilities), strict=True):
                batch["old"] = old
        if train.beta:
            with without_adapters(engine.shards):
                found = engine.read_logits(batches, self._log_probabilities)
            for batch, reference in zip(batches, found, strict=True):
                batch["reference"] = reference
        if is_foreign:
            self._weigh(batches, completions)

    def _weigh(self, batches: Sequence[Batch], completions: Sequence[Completion]) -> None:
        for index, batch in enumerate(batches):
            mask_bs, sampled_bs = batch["weights"] > 0, torch.zeros_like(batch["weights"])
            size = len(mask_bs)
            for row, completion in enumerate(completions[index * size : (index + 1) * size]):
                sampled_bs[row, mask_bs[row]] = torch.tensor(completion.log_probabilities, device=sampled_bs.device)
            difference_bs = (batch["old"] - sampled_bs).where(mask_bs, 0.0)
            batch["importance"] = importance_weights(difference_bs.nan_to_num(nan=0.0))
            add_sampler(self._tally, difference_bs, batch["importance"], mask_bs)

    def _log_probabilities(self, logits: Logits, batch: Batch) -> Tensor:
        return logits.log_probabilities(next_tokens(batch["labels"]), self._train.temperature)

    def _entry(self, rewards: Tensor, totals: Tensor, lengths: Sequence[int]) -> dict[str, float]:
        entry = {"completion_length": sum(lengths) / len(lengths)}
        if not totals.isnan().all():
            entry["reward"] = float(totals.nanmean())
            spread = float(deviations(totals[None]))
            entry |= {"reward_std": spread} if spread == spread else {}
            if len(self._rater.names) > 1:
                means = rewards.nanmean(dim=0).tolist()
                pairs = zip(self._rater.names, means, strict=True)
                entry |= {f"reward/{name}": mean for name, mean in pairs if mean == mean}
        return entry


def importance_weights(difference_bs: Tensor) -> Tensor:
    """Return (b, s), the same for all tokens of a completion: pi_old / pi_sampler, 0 where that is above 3.

    difference_bs: log pi_old - log pi_sampler, 0 outside completions. TRL's default, sequence_mask with 3.0 at most.
    """
    ratio = difference_bs.sum(-1, keepdim=True).exp()
    return ratio.where(ratio <= _MOST_IMPORTANCE, 0.0).expand(difference_bs.shape).contiguous()


@contextmanager
def without_adapters(shards: Sequence[AdapterShard]) -> Iterator[None]:
    """Let the model answer as it would without adapters: with B zero their part of every output is exactly zero."""
    kept = [shard.B.detach().clone() for shard in shards]
    with torch.no_grad():
        for shard in shards:
            shard.B.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for shard, B in zip(shards, kept, strict=True):
                shard.B.copy_(B)
