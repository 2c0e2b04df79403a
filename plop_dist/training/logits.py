"""What a model answers, wherever its vocabulary lies: log-probabilities of tokens, and whole rows of logits."""

# b rows, s tokens of the longest, V entries of the vocabulary

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from plop_dist.backends.entropy import token_entropies

Batch = dict[str, Tensor]  # see batch.Batch
IGNORED = -100  # the label that a loss skips


class Logits(Protocol):
    """A micro-batch's logits on the ranks that have computed them."""

    def log_probabilities(self, targets_bs: Tensor, temperature: float) -> Tensor:
        """Return the log-probability of each target, (b, s), float32, differentiable; 0 where the target is IGNORED.

        targets_bs: int64, the token that comes next. Of logits / temperature. Collective over the ranks that hold parts
        of the vocabulary.
        """
        ...

    def entropies(self, targets_bs: Tensor, temperature: float) -> Tensor:
        """Return how undecided each target's prediction is, as entropy.token_entropies does. Collective likewise."""
        ...

    def at(self, places_b: Tensor) -> Tensor:
        """Return each row's logits at one place, (b, V), float32, whole on every rank. Collective likewise."""
        ...


# (logits, micro-batch) -> the summed loss, a scalar to be differentiated
Objective = Callable[[Logits, Batch], Tensor]
# (logits, micro-batch) -> whatever is read of them without gradients
Read = Callable[[Logits, Batch], Tensor]


@dataclass(frozen=True)
class WholeLogits:
    """Logits (b, s, V) of any float dtype with the whole vocabulary, as transformers' models answer them."""

    values: Tensor

    def log_probabilities(self, targets_bs: Tensor, temperature: float) -> Tensor:
        """Return the targets' log-probabilities. See Logits."""
        flat = (self.values.float() / temperature).flatten(0, 1)
        losses = cross_entropy(flat, targets_bs.flatten(), ignore_index=IGNORED, reduction="none")
        return -losses.view_as(targets_bs)

    def entropies(self, targets_bs: Tensor, temperature: float) -> Tensor:
        """Return the entropies of the targets' predictions. See Logits."""
        return token_entropies(self.values, targets_bs != IGNORED, temperature)

    def at(self, places_b: Tensor) -> Tensor:
        """Return the logits at one place of each row. See Logits."""
        return self.values[torch.arange(len(places_b), device=places_b.device), places_b].float()


def next_tokens(labels_bs: Tensor) -> Tensor:
    """Return what each position predicts: labels (b, s) one place earlier, IGNORED at the last one."""
    targets = torch.full_like(labels_bs, IGNORED)
    targets[:, :-1] = labels_bs[:, 1:]
    return targets
