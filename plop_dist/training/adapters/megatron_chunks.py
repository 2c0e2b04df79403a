"""Megatron-Bridge's adapters on a rank's model chunks: put on, and where their parts lie."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from plop_dist.backends.megatron.chunks import unwrap
from plop_dist.backends.megatron.classes import changes_output
from plop_dist.backends.megatron.groups import read_place
from plop_dist.backends.megatron.language import language_model
from plop_dist.backends.megatron.names import HFNames, find_named_linears
from plop_dist.errors import LayoutError, PlacementError
from plop_dist.training.adapters.shards import AdapterShard
from plop_dist.values.mesh import nearest


def add_bridge_adapters(chunks: Sequence[nn.Module], peft: Any) -> RemovableHandle | None:
    """Put Bridge's adapters into chunks without wrappers, freeze the rest, and have every stage pass gradients on.

    Returns the hook that does the latter, if this stage needs one. Raises PlacementError where Bridge adds an adapter's
    output elsewhere than PEFT.
    """
    from megatron.core import parallel_state as state

    with _scored_alone(chunks):
        peft(list(chunks), training=True)
    _check_wrapped(chunks)
    first = language_model(chunks[0])
    if state.get_pipeline_model_parallel_world_size() > 1 and getattr(first, "pre_process", False):
        # A first stage without adapters would have nothing to send a gradient through.
        return first.get_submodule("embedding").register_forward_hook(_require_grad)
    return None


@contextmanager
def _scored_alone(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Keep adapters from what has no score and the same names: towers, multi-token prediction. They are frozen."""
    hidden: list[tuple[nn.Module, str, nn.Module]] = []
    for chunk in chunks:
        inner, language = unwrap(chunk), language_model(chunk)
        towers = [(inner, name, child) for name, child in inner.named_children() if child is not language]
        hidden += towers if language is not inner else []
        hidden += [(language, name, child) for name, child in language.named_children() if name == "mtp"]
    for holder, name, _ in hidden:
        setattr(holder, name, nn.Module())
    try:
        yield
    finally:
        for holder, name, child in hidden:
            setattr(holder, name, child.requires_grad_(False))


def check_ranks(ranks: Collection[int], tp_size: int) -> None:
    """Raise LayoutError for an adapter's rank that the tensor-parallel ranks cannot share."""
    for rank in sorted({*ranks}):
        if rank % tp_size:
            fitting = " or ".join(
                str(tp_size * near) for near in nearest(rank // tp_size, range(1, rank // tp_size + 2))
            )
            raise LayoutError(
                f"placement.rank ({rank}) is not divisible by parallel.tp ({tp_size}): Megatron shards A along the "
                f"rank; use placement.rank={fitting}."
            )


def chunk_shards(chunks: Sequence[nn.Module], names: HFNames) -> list[AdapterShard]:
    """Return the adapters of this rank's chunks under Hugging Face's paths. names: of Megatron's parameters. Local."""
    from megatron.core import parallel_state as state

    tp_group: Any = state.get_tensor_model_parallel_group()
    shards = []
    for chunk in chunks:
        bare = language_model(chunk)
        for linear in find_named_linears(bare, bare.config, read_place(bare.config).ep_rank, names):
            held: Any = getattr(linear.called, "adapter", None)
            if held is None:
                continue
            # CanonicalLoRA's parts are named adapter_q, ...; as q_proj begins with q, gate_proj with gate.
            adapters: dict[str, Any] = dict(held.items()) if isinstance(held, nn.ModuleDict) else {"": held}
            for part, adapter in adapters.items():
                fqn = _fqn(linear.fqns, part.removeprefix("adapter_"))
                # Of a column-parallel linear Megatron shards A along the rank.
                A_dim = 1 if adapter.input_is_parallel else 0
                A, B = adapter.linear_in.weight, adapter.linear_out.weight
                shards.append(AdapterShard(fqn, A, B, A_dim, 0, None, tp_group))
    return shards


def _check_wrapped(chunks: Sequence[nn.Module]) -> None:
    """Raise PlacementError for an adapter that Bridge adds behind a norm, which PEFT and inference add before it."""
    for name, module in (item for chunk in chunks for item in chunk.named_modules()):
        base = getattr(module, "to_wrap", None)
        if base is not None and changes_output(base):
            raise PlacementError(
                f"'{name}' is a {type(base).__name__}: its norm comes after the projection, and Megatron-Bridge adds "
                "the adapter's output after the norm, where PEFT adds it before; place adapters on other types than "
                "o_proj and down_proj (placement.exclude), or train with parallel.backend=deepspeed or transformers."
            )


def _fqn(fqns: Sequence[str], part: str) -> str:
    if not part:
        (fqn,) = fqns
        return fqn
    (fqn,) = (one for one in fqns if one.rpartition(".")[2].startswith(f"{part}_"))
    return fqn


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()
