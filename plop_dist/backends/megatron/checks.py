"""Whether the model that Megatron-Bridge built computes what the Hugging Face model does: weights, modules, attention.

Bridge only warns about weights without a place, and not at all about the fields of a configuration that it does not
read; either would give wrong scores in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from plop_dist.backends.hf.own_class import architecture
from plop_dist.backends.megatron.chunks import unwrap
from plop_dist.backends.megatron.language import language_model
from plop_dist.backends.megatron.rotary import check_rotary
from plop_dist.backends.megatron.sites import MegatronSite
from plop_dist.config.schema import Config
from plop_dist.errors import LayoutError, ModelError
from plop_dist.measure.protocols import Site

_ELSEWHERE = "use parallel.backend=deepspeed or transformers for it"


def check_experts(config: Any) -> None:
    """Raise LayoutError or ModelError where the norms of routed experts are nowhere to be seen. Local."""
    from megatron.core import parallel_state

    if not config.num_moe_experts:
        return
    etp = parallel_state.get_expert_tensor_parallel_world_size()
    if etp is not None and etp > 1:
        raise LayoutError(
            f"expert_tensor_parallel_size is {etp}: Megatron then adds up an expert's output only after mixing it with "
            "other experts', so its norm is nowhere to be seen; use expert_tensor_parallel_size=1."
        )
    if config.moe_token_dispatcher_type not in ("allgather", "alltoall"):
        raise ModelError(
            f"moe_token_dispatcher_type is '{config.moe_token_dispatcher_type}': the order in which its experts "
            "receive tokens is not known; use 'alltoall' or 'allgather'."
        )
    for field in ("moe_pad_expert_input_to_capacity", "moe_router_padding_for_quantization"):
        if getattr(config, field, False):
            raise ModelError(
                f"{field} is on: experts then also see tokens that were never routed to them; turn it off for scoring."
            )
    # Also in eval mode.
    for field in ("moe_input_jitter_eps", "moe_router_force_load_balancing", "moe_router_force_biased"):
        if getattr(config, field, None):
            raise ModelError(
                f"{field} is {getattr(config, field)}: the router then sends tokens to experts by chance; turn it off "
                "for scoring."
            )
    if getattr(config, "moe_mlp_glu_interleave_size", None) is not None:
        raise ModelError(
            f"moe_mlp_glu_interleave_size is {config.moe_mlp_glu_interleave_size}: gate and up of an expert then share "
            "out its rows in blocks, where they are looked for in halves; score the model with None."
        )
    if config.moe_shared_expert_overlap:
        raise ModelError(
            "moe_shared_expert_overlap is on: shared experts then leave their sums to another stream; turn it off."
        )


def check_heads(chunks: Sequence[nn.Module], tp_size: int) -> None:
    """Raise LayoutError or ModelError for attention whose heads or tokens are not told apart here. Local.

    chunks: in their wrappers; what sees images beside a language model makes that one's mask itself.
    """
    for chunk in chunks:
        language, inner = language_model(chunk), unwrap(chunk)
        groups = language.config.num_query_groups
        if groups is not None and groups < tp_size:
            raise LayoutError(
                f"num_query_groups is {groups} and the tensor-parallel size {tp_size}: a rank then holds a piece of a "
                "query group, whose q, k and v are not told apart; use a tensor-parallel size of at most "
                f"{groups}."
            )
        for path, module in inner.named_modules() if language is inner else ():
            kind = getattr(getattr(module, "self_attention", None), "attn_mask_type", None)
            if kind is not None and "causal" not in kind.name:
                raise ModelError(
                    f"'{path}' has attn_mask_type '{kind.name}': rows are padded behind their tokens, which causal "
                    "attention alone does not see; only models whose attention is causal are scored."
                )


def check_called(sites: Sequence[Site]) -> None:
    """Raise ModelError where a linear that is watched saw nothing of a forward pass that has just run. Local.

    Its weight is then used without it: absorbed into another product, or fused with another layer.
    """
    watched = [site for site in sites if isinstance(site, MegatronSite) and site.num_calls is not None]
    silent = [site for site in watched if site.num_calls == 0]
    if silent:
        site = silent[0]
        raise ModelError(
            f"'{site.projections[0].fqn}' is a {type(site.module).__name__} whose weight Megatron uses without calling "
            f"it ({len(silent)} of {len(watched)} linears here), so that what it computes is not seen; use "
            "parallel.backend=deepspeed or transformers, or switch the fusion of this layer off."
        )


def check_projections(found: Iterable[str], expected: Iterable[str], config: Config, device: torch.device) -> None:
    """Raise ModelError, on every rank, unless all ranks' projections are the Hugging Face model's. Collective.

    found: this rank's paths; expected: the whole model's, the same on every rank. device: one that collectives reach.
    What is sent does not grow with the number of ranks.
    """
    here, want = set(found), sorted(expected)
    seen = torch.tensor([path in here for path in want], dtype=torch.uint8, device=device)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    missing = [path for path, is_seen in zip(want, seen.tolist(), strict=True) if not is_seen]
    foreign = gather_set(here.difference(want))
    if not missing and not foreign:
        return
    path, what = min([(path, "no") for path in missing] + [(path, "a") for path in foreign])
    raise ModelError(
        f"model.name_or_path '{config.model.name_or_path}': Megatron-Bridge builds another model than transformers: "
        f"{len(missing)} projections are missing and {len(foreign)} are too many; it has {what} '{path}'. "
        f"{_ELSEWHERE.capitalize()}."
    )


def check_attention(hf_config: Any, hf_model: nn.Module, chunks: Sequence[nn.Module], config: Config) -> None:
    """Give Megatron the checkpoint's rotary frequencies; raise ModelError where attention still differs.

    Compared as far as the longest row reaches: cosines and sines, and every layer's sliding window.
    hf_model: on the meta device.
    """
    length = config.longest_row
    for chunk in map(unwrap, chunks):
        _check_tied(hf_config, hf_model, chunk, config)
        _check_windows(hf_config, chunk, length, config)
        check_rotary(hf_model, chunk, length, config)


def _check_tied(hf_config: Any, hf_model: Any, chunk: Any, config: Config) -> None:
    # Parts of a composite configuration may say otherwise than the whole, which transformers goes by.
    head, embeddings = hf_model.get_output_embeddings(), hf_model.get_input_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    if chunk.share_embeddings_and_output_weights != tied:
        raise ModelError(
            f"model.name_or_path '{config.model.name_or_path}': tie_word_embeddings is {tied}, which Megatron-Bridge "
            f"does not follow for {architecture(hf_config)}; {_ELSEWHERE}."
        )


def _check_windows(hf_config: Any, chunk: Any, length: int, config: Config) -> None:
    from megatron.core.transformer.utils import is_layer_window_attention

    text, own = hf_config.get_text_config(), chunk.config
    for layer in chunk.decoder.layers:
        kind = type(getattr(getattr(layer, "self_attention", None), "core_attention", None)).__name__
        if kind not in ("DotProductAttention", "TEDotProductAttention", "LocalMLAttention"):
            continue  # a family's own class, which reads its own fields
        expected = _window(text, layer.layer_number - 1)
        is_window = is_layer_window_attention(own.window_size, own.window_attn_skip_freq, layer.layer_number)
        found = own.window_size[0] + 1 if is_window else None
        if min(found or length, length) != min(expected or length, length):
            raise ModelError(
                f"model.name_or_path '{config.model.name_or_path}': layer {layer.layer_number - 1} attends to "
                f"{expected or 'all'} tokens, but Megatron-Bridge's to {found or 'all'}; set data.max_length (and "
                "train.max_length; with grpo data.max_length + train.max_completion_length) to "
                f"{min(filter(None, (found, expected)))} at most, or {_ELSEWHERE}."
            )


def _window(text: Any, layer: int) -> int | None:
    window = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    if types:
        return window if types[layer] == "sliding_attention" else None
    return window if getattr(text, "use_sliding_window", True) else None


def gather_set(items: Iterable[str]) -> set[str]:
    """Return the union of all ranks' items. Collective over the world."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, sorted(items))
    return {item for part in gathered for item in part}
