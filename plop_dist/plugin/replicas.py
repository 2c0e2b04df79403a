"""Whether ranks that seem to hold one model whole really do: a layout nobody knows must not pass for plain replicas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plop_dist.errors import LayoutError
from plop_dist.measure.collectives import Reducer
from plop_dist.measure.protocols import Groups

_MOST_SUMMED = 64  # parameters whose values are looked at; the names and shapes of all are
_MOST_VALUES = 4096  # of each of them

# Per parameter its shape and a sum, as text: one NaN is like another.
Signature = dict[str, tuple[tuple[int, ...], str]]


def check_replicas(roots: Sequence[nn.Module], groups: Groups, reducer: Reducer) -> None:
    """Raise LayoutError, on every rank, where ranks that claim to hold the same parameters do not.

    Only where every rank claims to be a replica; parameters that ZeRO or FSDP has partitioned are passed over.
    Compares names, shapes, and sums of some values. Collective over the world.
    """
    claims = groups.num_replicas > 1 and groups.num_replicas == _world_size() and not groups.features
    signatures = reducer.gather_objects(_signature(roots) if claims else None, "comparison of replicas")
    first = signatures[0]
    for rank, other in enumerate(signatures):
        if first is not None and other is not None and other != first:
            name = next(name for name in {**first, **other} if first.get(name) != other.get(name))
            raise LayoutError(
                f"ranks 0 and {rank} both seem to hold the whole model, but '{name}' differs: {_said(first, name)} on "
                f"rank 0, {_said(other, name)} on rank {rank}. If the model is split over ranks in a way of your own, "
                "score() does not know that layout; if it is meant to be one model, give all ranks the same parameters "
                "first (DistributedDataParallel and torch.distributed.broadcast do); if each rank has a model of its "
                "own, pass local=True."
            )


def _signature(roots: Sequence[nn.Module]) -> Signature:
    whole = dict(_whole_parameters(roots))
    step = -(-len(whole) // _MOST_SUMMED) or 1
    return {
        name: (tuple(parameter.shape), _sum(parameter) if number % step == 0 else "")
        for number, (name, parameter) in enumerate(whole.items())
    }


def _whole_parameters(roots: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for number, root in enumerate(roots):
        for name, parameter in root.named_parameters():
            if not (isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") or parameter.is_meta):
                yield (f"{number}.{name}" if len(roots) > 1 else name), parameter.detach()


def _sum(parameter: Tensor) -> str:
    """Return a weighted sum that tells parameters apart whose values only stand in another order."""
    values = parameter.reshape(-1)[:_MOST_VALUES].double()
    places = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device)
    return repr(float(values @ places))


def _said(signature: Signature, name: str) -> str:
    if name not in signature:
        return "missing"
    shape, total = signature[name]
    return f"{list(shape)} of values that sum up to {total}" if total else str(list(shape))


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
