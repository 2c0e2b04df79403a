"""A plain stack of decoder layers as pipeline layers: each hands on what the next one needs.

Where a model is known to be one, its layers in a row compute what the model does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plop_dist.backends.hf.model import is_packed
from plop_dist.errors import ModelError

# Families whose model does nothing outside of its layers, norm and head but what the layers below do as well: no factor
# on embeddings (Granite) or logits (Cohere), no second rotary embedding (Gemma 3). Held by test_pipeline_families.
_ONE_WINDOW = frozenset({"mistral", "mixtral", "phi3", "phimoe", "qwen2_moe", "qwen3_moe", "starcoder2"})
PLAIN_STACKS = _ONE_WINDOW | {
    "arcee", "ernie4_5", "exaone4", "gemma", "glm", "glm4", "helium", "llama", "ministral", "nemotron", "olmo", "olmo2",
    "olmoe", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm",
}  # fmt: skip


def pipeline_layers(model: Any) -> list[nn.Module]:
    """Return the model as a list of layers to cut into stages. Raises ModelError unless it is built like Llama."""
    body, config = model.base_model, model.config
    check_stack(config, type(model).__name__, has_head=hasattr(model, "lm_head"))
    decoder = [DecoderLayer(layer, body.rotary_emb, config, index) for index, layer in enumerate(body.layers)]
    return [Embedding(body.embed_tokens, config), *decoder, Head(body.norm, model.lm_head, config)]


def check_stack(config: Any, name: str, *, has_head: bool = True) -> None:
    """Raise ModelError for a model that is not known to be a plain stack of decoder layers.

    config: its transformers configuration; name: its class.
    """
    why = None
    if config.model_type not in PLAIN_STACKS:
        why = f"is of model_type {config.model_type!r}, which is not known to be one"
    elif kinds := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        why = f"has layers of type {', '.join(sorted(kinds))}"
    elif not has_head:
        why = "has no lm_head"
    if why:
        raise ModelError(
            f"DeepSpeed's pipeline takes causal language models that are a plain stack of decoder layers, but {name} "
            f"{why} (known: {', '.join(sorted(PLAIN_STACKS))}); use parallel.tp instead of parallel.pp, or "
            "parallel.backend=megatron."
        )


class StageLayer(nn.Module):
    """A layer of a pipeline; config: the transformers configuration of the model that it is part of."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config


class Embedding(StageLayer):
    """First pipeline layer: (input_ids, position_ids, attention_mask) -> (hidden, position_ids, attention_mask)."""

    def __init__(self, embed_tokens: nn.Module, config: Any):
        super().__init__(config)
        self.embed_tokens = embed_tokens

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states (batch, sequence, hidden) with what the decoder layers need beside them."""
        input_ids, position_ids, attention_mask = inputs
        hidden = self.embed_tokens(input_ids)
        if torch.is_grad_enabled():
            hidden.requires_grad_()  # the schedule sends a gradient back even where nothing here is trained
        return hidden, position_ids, attention_mask


class DecoderLayer(StageLayer):
    """One transformers decoder layer with the mask and rotary embedding that its model would hand to it."""

    def __init__(self, layer: nn.Module, rotary: nn.Module, config: Any, index: int):
        super().__init__(config)
        self.layer, self.rotary, self.index = layer, rotary, index
        types = getattr(config, "layer_types", None)
        has_window = config.model_type in _ONE_WINDOW and config.sliding_window is not None
        self.is_sliding = types[index] == "sliding_attention" if types else has_window

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next hidden states, and position_ids and attention_mask as they are."""
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        hidden, position_ids, attention_mask = inputs
        make_mask = create_sliding_window_causal_mask if self.is_sliding else create_causal_mask
        # transformers keeps packed samples apart only without a mask; padding behind them is out of their sight anyway.
        padding = None if is_packed(position_ids, attention_mask) else attention_mask
        mask = make_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=padding, past_key_values=None,
            position_ids=position_ids,
        )  # fmt: skip
        output = self.layer(
            hidden, attention_mask=mask, position_ids=position_ids, use_cache=False,
            position_embeddings=self.rotary(hidden, position_ids),
        )  # fmt: skip
        return output[0] if isinstance(output, tuple) else output, position_ids, attention_mask


class Head(StageLayer):
    """Last pipeline layer: the final norm and the LM head; returns logits (batch, sequence, vocab)."""

    def __init__(self, norm: nn.Module, lm_head: nn.Module, config: Any):
        super().__init__(config)
        self.norm, self.lm_head = norm, lm_head

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Return the logits."""
        return self.lm_head(self.norm(inputs[0]))
