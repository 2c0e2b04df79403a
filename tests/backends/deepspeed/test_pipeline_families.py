"""Every family that DeepSpeed's pipeline takes: its layers in a row are the model; all others are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plop_dist.backends.deepspeed.stack import PLAIN_STACKS, pipeline_layers
from plop_dist.errors import ModelError
from tests.models import random_tokens, tiny

FIELDS: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4}
WINDOW = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}


@pytest.mark.parametrize("fields", [{}, WINDOW], ids=["plain", "window"])
@pytest.mark.parametrize("family", sorted(PLAIN_STACKS))
@torch.no_grad()
def test_layers_in_a_row_are_the_model(family: str, fields: dict[str, Any]) -> None:
    experts = EXPERTS if "mo" in family or family == "mixtral" else {}
    model = tiny(family, **FIELDS, **experts, **fields)
    tokens, mask = random_tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[1, 9:] = 0
    positions = torch.arange(14).expand_as(tokens)
    expected = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    state: Any = (tokens, positions, mask)
    for layer in pipeline_layers(model):
        state = layer(state)
    torch.testing.assert_close(state[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["granite", "cohere", "gemma2", "gpt2"])
def test_models_that_do_more_are_refused(family: str) -> None:
    with pytest.raises(ModelError, match=r"not known to be one \(known: arcee, .* use parallel.tp instead"):
        pipeline_layers(tiny(family, **(FIELDS if family != "gpt2" else {})))


def test_known_families_built_otherwise_are_refused() -> None:
    model = tiny("qwen2", **FIELDS)
    with pytest.raises(ModelError, match="Qwen2Model has no lm_head"):
        pipeline_layers(model.model)
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ModelError, match="Qwen2ForCausalLM has layers of type linear_attention"):
        pipeline_layers(model)
