"""On a CUDA device the scores are those of the CPU, and the model comes back as it was."""

from __future__ import annotations

import pytest
import torch

import plop_dist
from tests.models import random_tokens, tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "qwen3_moe"])
def test_scores_on_the_gpu_are_those_of_the_cpu(family: str) -> None:
    tokens, mask = random_tokens(3, 24), torch.ones(3, 24, dtype=torch.int64)
    mask[1, 15:] = mask[2, :4] = 0
    batches = [{"input_ids": tokens, "attention_mask": mask}]
    expected = plop_dist.score(tiny(family), batches)
    model = tiny(family).cuda()
    before = torch.cuda.get_rng_state()
    found = plop_dist.score(model, batches)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    for one, other in zip(found.modules, expected.modules, strict=True):
        assert (one.fqn, one.num_tokens) == (other.fqn, other.num_tokens)
        assert (one.gain, one.baseline) == pytest.approx((other.gain, other.baseline), rel=1e-4), one.fqn
