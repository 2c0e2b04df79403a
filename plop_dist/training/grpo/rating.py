"""What the completions of a generation are worth: rated once each, known on every rank."""

# N completions of a generation, over all replicas; F rewards

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plop_dist import ranks
from plop_dist.errors import UserError
from plop_dist.training.data import RowSet
from plop_dist.training.loop import StepRefusedError
from plop_dist.training.reward_calls import checked
from plop_dist.training.rewards import Reward, columns_of


class Rater:
    """Rates completions: the first rank of each replica calls the rewards, the others are told.

    prompts: of each row, as text; timeout_s: for each reward in each step. Collective over all ranks.
    """

    def __init__(
        self, rewards: Mapping[str, Reward], row_set: RowSet, prompts: Sequence[str], timeout_s: float, dp_rank: int
    ) -> None:
        self.names = list(rewards)
        self._calls = [checked(name, reward, timeout_s) for name, reward in rewards.items()]
        self._row_set, self._prompts, self._columns = row_set, prompts, columns_of(row_set.rows)
        self._is_first = ranks.gathered(dp_rank).index(dp_rank) == ranks.rank()
        self._dp_rank = dp_rank

    def rate(
        self, places: Sequence[int], rows: Sequence[int], completions: Sequence[list[int]], texts: Sequence[str]
    ) -> tuple[Tensor, list[int]]:
        """Return the rewards of all replicas' completions, (N, F) float32, and how many tokens each has.

        NaN: not rated. places: which of the N this replica has; rows: the training rows that they belong to, counted
        from 0; completions, texts: their tokens and what these say. Raises StepRefusedError, on every rank, for a
        reward that raises, returns what is no number, or takes too long, and where the ranks of a replica differ.
        """
        digest = hashlib.sha256(repr(completions).encode()).hexdigest()
        own: dict[str, Any] = {"dp_rank": self._dp_rank, "tokens": digest, "rated": {}, "failed": None}
        if self._is_first:
            try:
                lengths = [len(ids) for ids in completions]
                own["rated"] = dict(zip(places, zip(self._rated(rows, texts), lengths, strict=True), strict=True))
            except UserError as error:
                own["failed"] = str(error)
        every = ranks.gathered(own)
        _check_alike(every)
        failed = [entry["failed"] for entry in every if entry["failed"] is not None]
        if failed:
            raise StepRefusedError(failed[0])
        rated = {place: found for entry in every for place, found in entry["rated"].items()}
        in_order = [rated[place] for place in range(len(rated))]
        return torch.tensor([rewards for rewards, _ in in_order]), [length for _, length in in_order]

    def _rated(self, rows: Sequence[int], texts: Sequence[str]) -> list[tuple[float, ...]]:
        chosen = [self._row_set.rows[row] for row in rows]
        numbers = [self._row_set.first + row for row in rows]
        columns = {key: [row.get(key) for row in chosen] for key in self._columns}
        prompts = [self._prompts[row] for row in rows]
        by_reward = [call(prompts, list(texts), numbers, **columns) for call in self._calls]
        return [
            tuple(float("nan") if value is None else value for value in values)
            for values in zip(*by_reward, strict=True)
        ]


def _check_alike(every: Sequence[Mapping[str, Any]]) -> None:
    """Raise StepRefusedError unless the ranks of each replica have the same completions."""
    first: dict[int, tuple[int, Any]] = {}
    for rank, entry in enumerate(every):
        other, tokens = first.setdefault(entry["dp_rank"], (rank, entry["tokens"]))
        if entry["tokens"] != tokens:
            raise StepRefusedError(
                f"ranks {other} and {rank} hold the same replica, but have sampled different completions: their logits "
                "differ. Use train.sampler=vllm, or report this layout."
            )
