"""A family that nobody has told this package of: what it gets by itself, and what one line in a table adds."""

# T tokens, I in_features

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3Attention

import plop_dist
from plop_dist.backends.deepspeed import stack
from plop_dist.backends.hf import fused
from plop_dist.errors import ModelError
from tests.models import random_tokens, tiny

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
ROWS = {"q_proj": (0, 32), "k_proj": (32, 48), "v_proj": (48, 64)}


class ToyConfig(Phi3Config):
    model_type = "toy"


class ToyAttention(Phi3Attention):
    """Keeps q, k and v in one linear, as a class that is in no table."""


class ToyForCausalLM(Phi3ForCausalLM):
    config_class = ToyConfig


def toy() -> Any:
    model: Any = tiny(
        "phi3", hidden_size=32, intermediate_size=48, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS
    )
    made = ToyForCausalLM(ToyConfig(**{**model.config.to_dict(), "model_type": "toy"})).eval()
    made.load_state_dict(model.state_dict())
    for layer in made.model.layers:
        layer.self_attn.__class__ = ToyAttention
    return made


def scores(model: Any, tokens: Tensor) -> dict[str, float]:
    found = plop_dist.score(model, [{"input_ids": row[None]} for row in tokens], num_directions=4)
    return {module.fqn: module.gain for module in found.modules}


@torch.no_grad()
def true_gains(model: Any, tokens: Tensor) -> dict[str, float]:
    """Return the mean gain of each part of the first layer's qkv_proj, from its input and its rows."""
    linear, seen = model.model.layers[0].self_attn.qkv_proj, []
    handle = linear.register_forward_hook(lambda module, args, output: seen.append(args[0].flatten(0, -2).double()))
    for row in tokens:
        model(input_ids=row[None])
    handle.remove()
    z_TI, weight = torch.cat(seen), linear.weight.double()
    parts = {name: weight[start:stop] for name, (start, stop) in ROWS.items()} | {"qkv_proj": weight}
    return {name: float(((z_TI @ part.T).norm(dim=1) / z_TI.norm(dim=1)).mean()) for name, part in parts.items()}


def test_a_fused_linear_is_scored_whole_until_a_line_says_how_its_rows_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = toy(), random_tokens(3, 9)
    truth = true_gains(model, tokens)
    unknown = scores(model, tokens)
    owner = "model.layers.0.self_attn"
    assert unknown[f"{owner}.qkv_proj"] == pytest.approx(truth["qkv_proj"], rel=1e-5)
    assert f"{owner}.q_proj" not in unknown
    monkeypatch.setitem(fused._LAYOUTS["qkv_proj"], "ToyAttention", fused._grouped_query)
    known = scores(model, tokens)
    assert f"{owner}.qkv_proj" not in known
    for name in ROWS:
        assert known[f"{owner}.{name}"] == pytest.approx(truth[name], rel=1e-5)
    assert len({round(truth[name], 3) for name in truth}) == 4, "a wrong layout would go unnoticed"


@torch.no_grad()
def test_a_pipeline_takes_it_once_it_is_known_to_be_a_plain_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = toy(), random_tokens(2, 9)
    with pytest.raises(ModelError, match="ToyForCausalLM is of model_type 'toy', which is not known to be one"):
        stack.pipeline_layers(model)
    monkeypatch.setattr(stack, "PLAIN_STACKS", stack.PLAIN_STACKS | {"toy"})
    state: Any = (tokens, torch.arange(9).expand_as(tokens), torch.ones_like(tokens))
    for layer in stack.pipeline_layers(model):
        state = layer(state)
    torch.testing.assert_close(state, model(input_ids=tokens).logits, rtol=1e-5, atol=1e-5)
