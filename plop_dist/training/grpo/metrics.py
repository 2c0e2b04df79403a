"""How far a step strays from the policy that sampled: what TRL logs, under TRL's names, the same in every layout."""

# b completions, s tokens of the longest row

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from plop_dist import ranks

_DIFFERENCE, _RATIO = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
_KINDS = ("entropy", "kl", "clip_ratio", "cispo_clip_ratio", "vespo", "sampling")  # before the first /


def is_metric(name: str) -> bool:
    """Tell whether a number of TRL's log is of the kind that is tallied here."""
    return name.partition("/")[0] in _KINDS


class Tally:
    """What this rank sees of each metric: a mean, or, where its name ends in min or max, the lowest or highest value.

    Sums and counts are kept and divided once, so that a mean is over all tokens of the step. TRL's is of the means of
    micro-batches, which the layout would change.
    """

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Note the values where the mask holds; both (b, s), or (b, 1) for what is of whole completions."""
        values, mask = values.detach().double(), mask.bool()
        if name.endswith("min"):
            found = values.masked_fill(~mask, math.inf).min()[None]
        elif name.endswith("max"):
            found = values.masked_fill(~mask, -math.inf).max()[None]
        else:
            found = torch.stack([values.masked_fill(~mask, 0.0).sum(), mask.sum().double()])
        self._found[name] = _joined(name, [self._found[name], found]) if name in self._found else found

    def take(self, dp_rank: int) -> dict[str, float]:
        """Return every metric over all replicas, on every rank, and begin anew. Collective over all ranks.

        The ranks of a replica have noted the same or, where they hold no logits, nothing.
        """
        own = {name: found.cpu() for name, found in self._found.items()}
        self._found = {}
        by_replica: dict[int, dict[str, Tensor]] = {}
        for replica, found in ranks.gathered((dp_rank, own)):
            by_replica[replica] = by_replica.get(replica) or found
        names = {name: None for found in by_replica.values() for name in found}
        values = {name: _value(_joined(name, (found[name] for found in by_replica.values()))) for name in names}
        return {name: value for name, value in values.items() if math.isfinite(value)}


def add_sampler(tally: Tally, difference_bs: Tensor, importance_bs: Tensor, mask_bs: Tensor) -> None:
    """Note how far sampler and trainer differ, token by token, and what the completions count for it.

    difference_bs: log pi_old - log pi_sampler, NaN where the sampler does not tell; importance_bs: as
    rollout.importance_weights returns it.
    """
    for end in ("mean", "max"):
        tally.add(f"{_DIFFERENCE}/{end}", difference_bs.abs(), mask_bs & ~difference_bs.isnan())
    for end in ("min", "mean", "max"):
        tally.add(f"{_RATIO}/{end}", importance_bs[:, :1], mask_bs.any(dim=1, keepdim=True))


def _joined(name: str, found: Iterable[Tensor]) -> Tensor:
    parts = torch.stack(list(found))
    return parts.amin(0) if name.endswith("min") else parts.amax(0) if name.endswith("max") else parts.sum(0)


def _value(found: Tensor) -> float:
    """Return an end as it is, a sum divided by its count."""
    return float(found[0] if len(found) == 1 else found[0] / found[1])
