"""Noise keyed by seed, generation, row and position samples the policy."""

from __future__ import annotations

import torch

from plop_dist.training.samplers.noise import noise_key, sampled


def test_tokens_are_as_frequent_as_the_policy_says() -> None:
    logits, temperature, number = torch.tensor([2.0, 0.5, -1.0, 0.0]), 0.7, 20_000
    tokens = sampled(logits.expand(number, 4), temperature, [noise_key(1, 0, row, 3) for row in range(number)])
    found = torch.bincount(tokens, minlength=4) / number
    expected = torch.softmax(logits / temperature, 0)
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / number).sqrt()).all()


def test_no_other_row_changes_a_token_and_every_part_of_the_key_does() -> None:
    logits = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    keys = [noise_key(5, 2, row, 7) for row in range(64)]
    whole = sampled(logits, 1.0, keys)
    assert torch.equal(whole[10:20], sampled(logits[10:20], 1.0, keys[10:20]))
    for other in ((6, 2, 7), (5, 3, 7), (5, 2, 8)):
        seed, generation, position = other
        assert not torch.equal(
            whole, sampled(logits, 1.0, [noise_key(seed, generation, r, position) for r in range(64)])
        )
