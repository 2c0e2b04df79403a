"""Leaves a ZeRO-3 engine's parameters partitioned or gathered as they were before a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def as_partitioned(engine: Any) -> Iterator[None]:
    """Release, on leaving, the parameters that were released before. Local; DeepSpeed keeps some whole for reuse.

    After an error all are released, those that stay whole between steps too: the next forward gathers them.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parameters = list(engine.module.parameters())
    released = [parameter for parameter in parameters if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE]
    try:
        yield
    except BaseException:
        # A forward that broke off leaves gathers under way and modules that count as active.
        offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
        offload.get_param_coordinator().release_and_reset_all(engine.module)
        raise
    left = [parameter for parameter in released if parameter.ds_status is ZeroParamStatus.AVAILABLE]
    if left:
        left[0].partition(left)
