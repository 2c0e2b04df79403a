"""A vocabulary that is padded, however far: losses, gradients and logits are those of the real one alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plop_dist.backends.megatron.vocab_parallel import VocabParallelLogits, hide_padding
from tests.installed import needs_bridge
from tests.spawn import run_ranks

pytestmark = [pytest.mark.slow, needs_bridge]
VOCAB_SIZE, HIDDEN, TEMPERATURE = 50, 8, 0.7
# To a multiple of two ranks, and further: the second rank then holds nothing but padding, as large as the vocabulary.
PADDED = (50, 54, 100, 256)


class Head(nn.Module):
    """Megatron's output layer: this rank's logits, or all ranks', and no bias. Rows of padding are not zero."""

    def __init__(self, whole_VI: Tensor, rank: int, gathers: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(whole_VI.chunk(2)[rank].clone())
        self._gathered = whole_VI if gathers else None

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return hidden @ (self.weight if self._gathered is None else self._gathered).T, None


def _job(rank: int) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    group: Any = parallel_state.get_tensor_model_parallel_group()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, HIDDEN, generator=generator)
    targets = torch.tensor([[49, 0, 27], [3, -1, 26]])
    for padded in PADDED:
        whole = torch.randn(padded, HIDDEN, generator=generator)
        real = whole[:VOCAB_SIZE].clone().requires_grad_()
        expected = (hidden @ real.T / TEMPERATURE).log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
        expected = expected.masked_fill(targets < 0, 0.0)
        expected.sum().backward()
        assert real.grad is not None
        gradient = nn.functional.pad(real.grad, (0, 0, 0, padded - VOCAB_SIZE)).chunk(2)[rank]
        head, gathering = Head(whole, rank, False), Head(whole, rank, True)
        chunk, other = nn.Module(), nn.Module()
        chunk.output_layer, other.output_layer = head, gathering
        hide_padding([chunk, other], VOCAB_SIZE)
        logits = VocabParallelLogits(head(hidden)[0], group, VOCAB_SIZE)
        found = logits.log_probabilities(targets, TEMPERATURE)
        found.sum().backward()
        torch.testing.assert_close(found, expected.detach(), msg=f"{padded}")
        torch.testing.assert_close(head.weight.grad, gradient, msg=f"{padded}")
        places = torch.tensor([2, 0])
        torch.testing.assert_close(logits.at(places), (hidden @ real.T)[torch.arange(2), places].detach())
        is_hidden = gathering(hidden)[0].isneginf()
        assert not is_hidden[..., :VOCAB_SIZE].any()
        assert is_hidden[..., VOCAB_SIZE:].all()


def test_no_padding_is_counted_or_sampled() -> None:
    run_ranks(2, _job)
