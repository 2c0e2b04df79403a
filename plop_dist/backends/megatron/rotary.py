"""Whether Megatron turns queries and keys by the angles that transformers does, and its YaRN completed."""

# s positions, D rotary dimensions

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plop_dist.backends.megatron.language import language_path
from plop_dist.config.schema import Config
from plop_dist.errors import ModelError

# Fields of YaRN in Bridge's providers -> what a checkpoint's configuration calls them, and transformers' defaults.
# Bridge sets some only where the configuration has them, and some to those of the published models (Ministral 3).
_YARN = {
    "yarn_rotary_scaling_factor": ("factor", None),
    "yarn_original_max_position_embeddings": ("original_max_position_embeddings", None),
    "yarn_beta_fast": ("beta_fast", 32.0),
    "yarn_beta_slow": ("beta_slow", 1.0),
    "yarn_correction_range_round_to_int": ("truncate", True),
}


def complete_rotary(provider: Any, hf_config: Any) -> None:
    """Give a Bridge provider the axes of its checkpoint, and with YaRN what this leaves to transformers' defaults."""
    rope = getattr(hf_config.get_text_config(), "rope_parameters", None) or {}
    axes = rope.get("mrope_section")
    if axes and getattr(provider, "mrope_section", None):
        provider.mrope_section = axes  # Bridge takes that of the published models
    if getattr(provider, "position_embedding_type", None) != "yarn":
        return
    length = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    for name, (key, default) in _YARN.items():
        value = next(
            (one for one in (rope.get(key), default, getattr(provider, name, None)) if one is not None), length
        )
        if hasattr(provider, name):
            setattr(provider, name, value)


def check_rotary(hf_model: nn.Module, chunk: nn.Module, length: int, config: Config) -> None:
    """Give a chunk the checkpoint's frequencies; raise ModelError where positions still turn otherwise. Local.

    hf_model: on the meta device. length: how many positions are compared.
    """
    language = hf_model.get_submodule(language_path(hf_model))  # towers beside it turn patches by angles of their own
    theirs: Any = next((m for name, m in language.named_modules() if name.endswith("rotary_emb")), None)
    ours: Any = next((m for m in chunk.modules() if "RotaryEmbedding" in type(m).__name__), None)
    if theirs is None or ours is None or not hasattr(theirs, "inv_freq"):
        return  # no rotary embedding, or one per kind of layer, which families' own layers take care of
    rotary = type(theirs)(theirs.config)  # with numbers, off the meta device
    if type(ours).__name__ == "RotaryEmbedding" and rotary.inv_freq.shape == ours.inv_freq.shape:
        # Megatron fixes what it does not read (llama3's original length) and scales positions where others scale this.
        ours.inv_freq = rotary.inv_freq.float().to(ours.inv_freq.device)
        ours.seq_len_interpolation_factor = None
    expected = _transformers_cosines(rotary, length)
    try:
        found = _megatron_cosines(ours, length, is_cut=config.parallel.cp > 1)
    except TypeError:  # fields of YaRN that Bridge has left unset
        found = torch.zeros(0)
    if expected.shape[-1] * 2 == found.shape[-1]:  # one for each pair of dimensions (complex numbers, GPT-OSS)
        expected = torch.cat([expected, expected], dim=-1)
    expected = expected.sort(dim=-1).values
    if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-4):
        raise ModelError(
            f"model.name_or_path '{config.model.name_or_path}': its rotary embedding ({theirs.config.rope_parameters}) "
            "is another in Megatron; use parallel.backend=deepspeed or transformers for it."
        )


def _megatron_cosines(rotary: Any, length: int, *, is_cut: bool) -> Tensor:
    """Return the sorted cosines of every position, (s, D), whatever the order of dimensions.

    is_cut: a context-parallel rank by itself has those of its own positions.
    """
    if "Multimodal" in type(rotary).__name__:  # time, height and width, the same for text
        angles, scale = rotary(_places(length), [rotary.inv_freq.numel(), 0, 0]), 1.0
    else:
        angles, scale = rotary(length, **({"packed_seq": True} if is_cut else {})), 1.0
    if isinstance(angles, tuple):
        angles, scale = angles
    return (angles.flatten(1).float().cos() * scale).sort(dim=-1).values.cpu()


def _transformers_cosines(rotary: Any, length: int) -> Tensor:
    is_multimodal = hasattr(rotary, "mrope_section") or "mrope_section" in (rotary.config.rope_parameters or {})
    found = rotary(torch.zeros(1), _places(length) if is_multimodal else torch.arange(length)[None])
    cosines = found.real if torch.is_tensor(found) else found[0]
    return (cosines[0] if cosines.dim() == 3 else cosines[0, 0]).float()


def _places(length: int) -> Tensor:
    return torch.arange(length).expand(3, 1, length)
