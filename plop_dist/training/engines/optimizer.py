"""AdamW over adapter shards: gradients summed over replicas, clipped by the whole norm, stepped alike everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from plop_dist.config.schema import TrainConfig
from plop_dist.training.adapters.shards import AdapterShard, parameters_of
from plop_dist.training.sums import clip_factor, grad_norm


class AdapterOptimizer:
    """One rank's AdamW for the engines without an optimizer of their own.

    shards: this rank's adapters, in the same order on every replica. dp_group: the replicas, whose gradients are
    summed (the loss is already divided by the global batch's tokens). norm_groups: the groups over which squared norms
    add up besides each shard's own group (pipeline stages).
    """

    def __init__(
        self,
        shards: Sequence[AdapterShard],
        train: TrainConfig,
        dp_group: dist.ProcessGroup | None,
        norm_groups: Sequence[dist.ProcessGroup] = (),
    ):
        self._shards, self._max_norm, self._dp_group, self._norm_groups = (
            shards,
            train.max_grad_norm,
            dp_group,
            norm_groups,
        )
        self._parameters = parameters_of(shards)
        # In bfloat16 an update smaller than a 256th of the weight would be lost: AdamW works on float32 copies.
        self._masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self._parameters]
        # A pipeline stage may hold no adapter at all; torch refuses an optimizer without parameters.
        self._adamw = (
            torch.optim.AdamW(self._masters, lr=train.learning_rate, weight_decay=train.weight_decay)
            if self._masters
            else None
        )

    @torch.no_grad()
    def step(self, learning_rate: float, device: torch.device) -> float:
        """Sum, clip, update and clear the gradients; return their norm before clipping, over all ranks.

        Collective over dp_group, the shards' groups and norm_groups.
        """
        gradients = [self._summed_gradient(parameter) for parameter in self._parameters]
        norm = grad_norm(self._shards, device, self._norm_groups)
        factor = clip_factor(norm, self._max_norm)
        for gradient, master in zip(gradients, self._masters, strict=True):
            master.grad = gradient.to(master.dtype).mul_(factor)
        if self._adamw is not None:
            for group in self._adamw.param_groups:
                group["lr"] = learning_rate
            self._adamw.step()
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if parameter is not master:
                parameter.copy_(master)
            parameter.grad = master.grad = None
        return norm

    def state(self) -> dict[str, Any]:
        """Return this rank's adapter parameters and AdamW's state."""
        return {
            "adapters": [master.detach().cpu() for master in self._masters],
            "optimizer": self._adamw.state_dict() if self._adamw is not None else None,
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what state() returned, in place."""
        for parameter, master, saved in zip(self._parameters, self._masters, state["adapters"], strict=True):
            master.copy_(saved)
            parameter.copy_(saved)
        if self._adamw is not None:
            self._adamw.load_state_dict(state["optimizer"])

    def _summed_gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        gradient = parameter.grad
        if gradient is None:
            gradient = parameter.grad = torch.zeros_like(parameter)
        if self._dp_group is not None:
            dist.all_reduce(gradient, group=self._dp_group)
        return gradient
