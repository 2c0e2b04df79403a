"""Ranks that hold different parameters are no replicas, however alike they look from each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import plop_dist
from plop_dist.errors import LayoutError
from tests.models import random_tokens, tiny
from tests.spawn import run_ranks


def _other_seed(model: Any) -> None:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)


def _one_entry(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, :2] = model.model.layers[1].mlp.up_proj.weight[0, :2].flip(0)


def _pipeline_by_hand(model: Any) -> None:
    del model.model.layers[-1]


def _experts_by_hand(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(4, 16))


def _not_a_number(model: Any) -> None:
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = torch.nan


DIFFERENT = (_other_seed, _one_entry, _pipeline_by_hand, _experts_by_hand)


def _messages(rank: int) -> list[str]:
    batches = [{"input_ids": random_tokens(1, 4)}]
    found = []
    for change in DIFFERENT:
        model = tiny("llama")
        if rank:
            change(model)
        with pytest.raises(LayoutError) as caught:
            plop_dist.score(model, batches)
        found.append(str(caught.value))
    own = tiny("llama")
    _not_a_number(own)
    assert plop_dist.score(own, batches).modules
    if rank:
        _other_seed(own)
    assert plop_dist.score(own, batches, local=True).modules
    return found


@pytest.mark.slow
def test_ranks_with_different_parameters_are_refused_on_all_of_them() -> None:
    first, second = run_ranks(2, _messages)
    assert first == second
    for message in first:
        assert message.startswith("ranks 0 and 1 both seem to hold the whole model, but 'model.")
    assert "'model.layers.1.mlp.up_proj.weight' differs" in first[1]
    assert "missing on rank 1" in first[2]
    assert "[4, 16]" in first[3]
