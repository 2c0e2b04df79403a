"""What a choice is said to cost in training is what PEFT's layers keep, and what other choices at its rank come to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import plop_dist
from plop_dist.choose.beside import beside, kept_bytes
from plop_dist.choose.decision import decide
from plop_dist.choose.place import placement_of
from plop_dist.training.adapters.shards import lora_layers
from plop_dist.values.scores import Scores
from tests.exporters.cases import projections_of, scores_of
from tests.made_scores import made_scores
from tests.models import random_tokens, tiny


def scores_of_llama(dtype: str) -> Scores:
    scores = scores_of(projections_of(tiny("llama")))
    return scores.model_copy(update={"model": scores.model.model_copy(update={"dtype": dtype})})


def measured(model: nn.Module, num_tokens: int) -> float:
    """Return the bytes per token of the tensors, each storage once, that A and B of all adapters read."""
    storages: dict[int, torch.Tensor] = {}

    def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        storages[args[0].untyped_storage().data_ptr()] = args[0]  # held, so that no other gets its place

    for _, layer in lora_layers(model):
        layer.lora_A["default"].register_forward_pre_hook(note)
        layer.lora_B["default"].register_forward_pre_hook(note)
    model(input_ids=random_tokens(1, num_tokens))
    return sum(tensor.numel() * tensor.element_size() for tensor in storages.values()) / num_tokens


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lowest_k", "mlp", "attention", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_bytes_are_those_of_peft_s_layers(policy: str, dtype: torch.dtype) -> None:
    from peft import get_peft_model

    name = str(dtype).removeprefix("torch.")
    placement = plop_dist.place(scores_of_llama(name), policy=policy, k=3, rank=4, alpha=8)
    model = get_peft_model(tiny("llama").to(dtype), placement.to_peft())
    expected = kept_bytes(placement.chosen, placement.rank_of, is_float32=dtype is torch.float32)
    assert measured(model, 16) == expected


def test_mlp_and_all_stand_beside_the_choice_at_its_rank_or_at_one_size() -> None:
    scores = scores_of_llama("float32")
    same_rank = decide(scores, k=2, rank=4)
    chosen, mlp, everything = beside(same_rank, placement_of(same_rank))
    assert [row.name for row in (chosen, mlp, everything)] == ["this placement", "mlp", "all"]
    assert {row.rank for row in (chosen, mlp, everything)} == {4}
    assert mlp.num_parameters < everything.num_parameters
    assert mlp.kept_bytes == 2 * 4 * (64 + 96 + 3 * 4)  # gate and up read one input, down another; rank 4 each
    matched = decide(scores, k=2, rank=4, match="all")
    sizes = [row.num_parameters for row in beside(matched, placement_of(matched))]
    assert max(sizes) / min(sizes) < 1.1


def test_of_routed_experts_nothing_is_said_that_depends_on_their_tokens() -> None:
    decision = decide(made_scores(), policy="mlp", experts=True, rank=1)
    rows = {row.name: row for row in beside(decision, placement_of(decision))}
    assert rows["this placement"].kept_bytes is None
