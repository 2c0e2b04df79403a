"""Megatron's own pipeline schedule over this rank's chunks, with or without the backward pass."""

# b samples, s tokens of the longest

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from plop_dist.backends.megatron.batch import Prepared

# (index, micro-batch, chunk) -> the chunk's output
Call = Callable[[int, Prepared, Any], Tensor]


class Loss(Protocol):
    """What is computed from a micro-batch's output."""

    def __call__(self, output: Tensor, *, batch: Prepared) -> tuple[Tensor, dict[str, Any]]:
        """Return what is differentiated, and what is kept of it."""
        ...


def run_schedule(
    chunks: Sequence[nn.Module],
    batches: Sequence[Prepared],
    call: Call,
    loss: Loss | None = None,
    *,
    cp_size: int,
    forward_only: bool,
) -> list[dict[str, Any]]:
    """Run all micro-batches through the chunks; return what `loss` keeps of each, [] on ranks without the last chunk.

    batches: this replica's, each (b, s) of this context-parallel rank's share; at least one, and with several chunks
    per rank a multiple of the pipeline's depth. loss: None where only activations matter. The schedule divides
    gradients by the number of micro-batches and multiplies them by cp_size. Collective over the replica's ranks.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(source: Iterator[tuple[int, Prepared]], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        index, batch = next(source)
        output = call(index, batch, chunk)
        return output, _nothing if loss is None else partial(loss, batch=batch)

    sources: list[Iterator[Any]] = [iter(enumerate(batches)) for _ in chunks]
    num_rows, num_tokens = batches[0].input_ids.shape
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=sources if len(sources) > 1 else sources[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=num_tokens * cp_size,
        micro_batch_size=num_rows,
        forward_only=forward_only,
        collect_non_loss_data=loss is None,
    )


def _nothing(output: Any, non_loss_data: bool = False) -> None:
    return None
