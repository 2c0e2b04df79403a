"""Logits whose vocabulary is cut over Megatron's tensor-parallel ranks."""

# b rows, s tokens of the longest, V entries of the vocabulary

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plop_dist.backends.entropy import token_entropies
from plop_dist.backends.megatron.language import language_model
from plop_dist.backends.megatron.names import local_out_features


@dataclass(frozen=True)
class VocabParallelLogits:
    """Logits (b, s, V_local) whose vocabulary is cut over `group` in the order of its ranks.

    vocab_size: without padding, which hide_padding has answered with -inf.
    """

    values: Tensor
    group: dist.ProcessGroup
    vocab_size: int

    def log_probabilities(self, targets_bs: Tensor, temperature: float) -> Tensor:
        """Return the log-probability of each target, (b, s), float32, of logits / temperature; 0 for negative ones.

        targets_bs: int64, the token that comes next. Differentiable. Collective over `group`.
        """
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        # A new tensor, because Megatron's own changes what it is given.
        losses = vocab_parallel_cross_entropy(self.values.float() / temperature, targets_bs.clamp_min(0))
        return -losses.masked_fill(targets_bs < 0, 0.0)

    def entropies(self, targets_bs: Tensor, temperature: float) -> Tensor:
        """Return how undecided the prediction of each target that is not negative is. See token_entropies."""
        return token_entropies(self.values, targets_bs >= 0, temperature, self.group)

    def at(self, places_b: Tensor) -> Tensor:
        """Return each row's logits at one place, (b, V), float32, whole. Collective over `group`."""
        local = self.values[torch.arange(len(places_b), device=places_b.device), places_b].float().contiguous()
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, local, group=self.group)
        return torch.cat(parts, dim=-1)[:, : self.vocab_size]


def hide_padding(chunks: Iterable[nn.Module], vocab_size: int) -> None:
    """Let what pads the vocabulary, however far, answer with -inf, so that no softmax counts it.

    Where its weights are zero its logits are too: as likely as a token that is neither likely nor unlikely.
    """
    for chunk in chunks:
        head = getattr(language_model(chunk), "output_layer", None)
        if head is not None:
            head.register_forward_hook(partial(_hidden, vocab_size))


def _hidden(vocab_size: int, module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
    from megatron.core import parallel_state as state

    logits, bias = output
    width = logits.shape[-1]
    is_gathered = width != local_out_features(module)
    first = 0 if is_gathered else state.get_tensor_model_parallel_rank() * width
    num_real = min(max(vocab_size - first, 0), width)
    if num_real == width:
        return None
    is_padding = torch.arange(width, device=logits.device) >= num_real
    return logits.masked_fill(is_padding, -torch.inf), bias
