"""Tiny random Hugging Face models whose weights are unequal, badly scaled and correlated: wrong formulas show."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 128
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

_LLAMA_LIKE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
               "num_key_value_heads": 4}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# Heads, key-value heads, features and experts divide by 2 and by 4; layers divide by 2.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": {**_LLAMA_LIKE, "head_dim": 8},
    "phi3": _LLAMA_LIKE,
    "mixtral": {**_LLAMA_LIKE, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_LLAMA_LIKE, **_MOE, "head_dim": 8},
    "qwen3_next": {
        **_LLAMA_LIKE, **_MOE, "head_dim": 8, "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 4, "linear_num_value_heads": 8,
    },
    "gpt_oss": {**_LLAMA_LIKE, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_kv_heads": 2},
    "mamba": {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4},
}  # fmt: skip


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """Return the configuration of a tiny model; `overrides` are its fields (all of them where FAMILIES has none)."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    return AutoConfig.for_model(family, **{**fields, **FAMILIES.get(family, {}), **overrides})


def tiny(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a float32 model in eval mode, the same one for the same arguments on every machine and rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32)
    spoil_all(model, seed)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of VOCAB_SIZE tokens: printable ASCII, newline, tab and a few pairs; pads on the right."""
    characters = [chr(code) for code in range(32, 127)] + ["\n", "\t"]
    pairs = ("th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or", "te", "of", "ed", "is", "it",
             "al", "ar", "st", "to", "nt", "ng", "se", "ha", "as")  # fmt: skip
    tokens = [*SPECIAL_TOKENS, *characters, *pairs]
    assert len(tokens) == VOCAB_SIZE, f"{len(tokens)} tokens, expected {VOCAB_SIZE}"
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab, [(pair[0], pair[1]) for pair in pairs], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny(
    family: str, directory: str | Path, *, seed: int = 0, shard_size: str | None = None, **overrides: Any
) -> Path:
    """Save tiny(family) as safetensors with its tokenizer beside it, and return the directory.

    shard_size: largest file, e.g. "40KB"; the default leaves one.
    """
    target = Path(directory)
    options = {} if shard_size is None else {"max_shard_size": shard_size}
    tiny(family, seed=seed, **overrides).save_pretrained(target, **options)
    tiny_tokenizer().save_pretrained(target)
    return target


def random_tokens(batch: int, length: int, *, seed: int = 0) -> Tensor:
    """Return (batch, length) int64 token ids without special tokens, seeded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL_TOKENS), VOCAB_SIZE, (batch, length), generator=generator)


def padded_batches(samples: Sequence[Tensor], side: str) -> list[dict[str, Tensor]]:
    """Return the samples, (s,) each, two a batch, padded on this side."""
    made = []
    for start in range(0, len(samples), 2):
        rows = samples[start : start + 2]
        length = max(map(len, rows))
        ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
        for row, sample in enumerate(rows):
            place = slice(length - len(sample), length) if side == "left" else slice(0, len(sample))
            ids[row, place], mask[row, place] = sample, 1
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every nn.Linear of the model by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def spoil_all(model: nn.Module, seed: int = 0) -> None:
    """Overwrite a model's weights by unequal, badly scaled and correlated ones, the same for the same names."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spoil(name, parameter, seed)


def spoil(name: str, parameter: Tensor, seed: int) -> None:
    """Overwrite a parameter: matrices get correlated rows of scales that differ 30-fold, vectors get noise added."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if parameter.dim() < 2 or name.endswith(("A_log", "conv1d.weight")):
        if not name.endswith(("A_log", "dt_bias", "dt_proj.bias", ".D")):  # state-space dynamics must stay stable
            parameter.add_(0.1 * normal(*parameter.shape))
        return
    columns = parameter.shape[-1]
    shared = normal(*parameter.shape[:-1], 2) @ normal(*parameter.shape[:-2], 2, columns)
    scale = torch.exp(normal(*parameter.shape[:-1], 1).clamp(-1.7, 1.7))
    level = math.exp(float(normal(1).clamp(-1, 1))) / math.sqrt(columns)
    parameter.copy_(0.5 * level * scale * (normal(*parameter.shape) + shared))
