"""The gate of shared experts: one row that Megatron keeps as a bare parameter, multiplied beside the experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from plop_dist.measure.norms import local_sq_norm
from plop_dist.measure.protocols import LocalWeight, Part, Recorder
from plop_dist.measure.weight import Stored, find_weight
from plop_dist.values.scores import Projection

GATE = "gate_weight"


class SharedGateSite:
    """Reads what the shared experts read; every tensor rank holds the row whole."""

    group, holder = "tp", None

    def __init__(self, module: nn.Module, projection: Projection, *, is_sequence_parallel: bool) -> None:
        self.module = module
        self.projections: tuple[Projection, ...] = (projection,)
        self._part = Part.TOKENS if is_sequence_parallel else Part.WHOLE

    def attach(self, recorder: Recorder) -> Callable[[], None]:
        """Install the hook and return the function that removes it."""

        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            z = args[0] if args else next(iter(kwargs.values()))
            logits = torch.nn.functional.linear(z, module.get_parameter(GATE).to(z.dtype))
            recorder.record(
                self, recorder.sq_norm(z), [local_sq_norm(logits)], in_part=self._part, out_part=self._part,
                leading_shape=z.shape[:-1],
            )  # fmt: skip

        return self.module.register_forward_pre_hook(observe, prepend=True, with_kwargs=True).remove

    @contextmanager
    def weights(self) -> Iterator[Iterator[LocalWeight]]:
        """Give access to the row; nothing is communicated."""
        projection = self.projections[0]
        yield iter([LocalWeight(projection, find_weight(Stored(self.module, GATE, path=projection.fqn)))])
