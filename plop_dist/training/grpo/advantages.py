"""How much better a completion is than the others of its prompt: advantages from rewards, as TRL 1.16 has them."""

# N completions, the num_generations of a prompt in a row; F rewards

from __future__ import annotations

import torch
from torch import Tensor

from plop_dist.config.schema import TrainConfig

_LEAST_DEVIATION = 1e-4


def total_rewards(rewards_NF: Tensor, weights: list[float] | None) -> Tensor:
    """Return the weighted sum of each completion's rewards, (N,); NaN, which is "not rated", where all of them are."""
    weights_F = torch.ones(rewards_NF.shape[1]) if weights is None else torch.tensor(weights)
    totals = (rewards_NF * weights_F).nansum(dim=1)
    return totals.masked_fill(rewards_NF.isnan().all(dim=1), torch.nan)


def advantages_of(totals_N: Tensor, train: TrainConfig) -> Tensor:
    """Return (N,): each total less its group's mean, divided as train.scale_rewards says; 0 for what is not rated."""
    groups = totals_N.view(-1, train.num_generations)
    centred = (groups - groups.nanmean(dim=1, keepdim=True)).flatten()
    if train.scale_rewards == "group":
        centred = centred / (deviations(groups).repeat_interleave(train.num_generations) + _LEAST_DEVIATION)
    elif train.scale_rewards == "batch":
        centred = centred / (deviations(totals_N[None]) + _LEAST_DEVIATION)
    return centred.nan_to_num(nan=0.0)


def deviations(rows: Tensor) -> Tensor:
    """Return each row's standard deviation (of a sample) over what is rated; NaN where that is one or none."""
    count = (~rows.isnan()).sum(dim=1)
    squares = ((rows - rows.nanmean(dim=1, keepdim=True)) ** 2).nansum(dim=1)
    return (squares / torch.where(count > 1, count - 1, torch.nan)).sqrt()
