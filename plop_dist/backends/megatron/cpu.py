"""How Megatron-core runs without CUDA: a handful of patches, for tests and laptops.

Nothing else knows of it; where CUDA is present none of this is imported into use.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@functools.cache
def prepare() -> None:
    """Point megatron-core at the CPU, once, and say so in the log. Call it where there is no CUDA alone.

    Raises ModuleNotFoundError when megatron-core is not installed.
    """
    changes = _patch_cuda_calls()
    logger.warning("Megatron without CUDA: %s; expect the speed of a test.", ", ".join(changes))


def _patch_cuda_calls() -> list[str]:
    """Point megatron-core's hard-wired CUDA calls at the CPU; return what was changed, for the log."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer import utils as megatron_utils
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_, **__: None
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]  # tied embeddings under pp
    torch.cuda.Stream = _Stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda *_, **__: _CPU_STREAM  # type: ignore[assignment,return-value]
    # They ask for device="cuda", or for pinned memory.
    schedules.torch = megatron_utils.torch = rope_utils.torch = _TorchOnCpu(torch)
    megatron_random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = _as_numpy
    return ["torch.cuda device, stream and copy calls", "pipeline schedule counters", "random state tracker"]


def prepare_bridge() -> None:
    """Point at the CPU what asks for CUDA in Megatron-Bridge, which must be imported."""
    from megatron.bridge.models.minimax_m2 import minimax_m2_bridge

    minimax_m2_bridge.torch = _TorchOnCpu(torch)


class _Stream:
    """Stands for the one stream of a CPU."""

    def wait_stream(self, stream: Any) -> None:
        pass

    def record_event(self, *_: Any) -> _Stream:
        return self

    def synchronize(self) -> None:
        pass


_CPU_STREAM = _Stream()


class _TorchOnCpu:
    """The torch module whose `zeros`, `ones`, `tensor` and `device` know the CPU alone, for modules of Megatron."""

    def __init__(self, module: Any):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def zeros(self, *size: Any, **kwargs: Any) -> Tensor:
        return self._module.zeros(*size, **_on_cpu(kwargs))

    def ones(self, *size: Any, **kwargs: Any) -> Tensor:
        return self._module.ones(*size, **_on_cpu(kwargs))

    def tensor(self, *data: Any, **kwargs: Any) -> Tensor:
        return self._module.tensor(*data, **_on_cpu({**kwargs, "pin_memory": False}))

    def device(self, *_: Any, **__: Any) -> torch.device:
        return torch.device("cpu")


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "device": "cpu"} if kwargs.get("device") == "cuda" else kwargs


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    # Megatron turns split sizes into numpy only when they come from a GPU; gloo wants integers, not tensors.
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
