"""How Megatron runs without CUDA and without Transformer Engine: a stub, a handful of patches and a norm.

Only for tests and laptops; `prepare` announces every substitution in the log and touches nothing where CUDA or
Transformer Engine is present.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_STUBBED = "transformer_engine"


def has_transformer_engine() -> bool:
    """Tell whether the real Transformer Engine is installed."""
    if _STUBBED in sys.modules:
        return not isinstance(sys.modules[_STUBBED], _StubModule)
    return importlib.util.find_spec(_STUBBED) is not None


@functools.cache
def prepare() -> None:
    """Make Megatron-core usable here; without effect where CUDA and Transformer Engine are present.

    Call before the first import of Megatron-Bridge. Raises ModuleNotFoundError when megatron-core is not installed.
    """
    importlib.import_module("megatron.core")
    if not torch.cuda.is_available():
        changes = _patch_cuda_calls()
        logger.warning("Megatron without CUDA: %s; expect the speed of a test.", ", ".join(changes))


def import_bridge() -> types.ModuleType:
    """Return the module megatron.bridge, imported under a Transformer Engine stub where the real one is absent.

    megatron-core is imported before the stub, so that it keeps its local layers. Raises ImportError.
    """
    prepare()
    if "megatron.bridge" in sys.modules:
        return sys.modules["megatron.bridge"]
    if not has_transformer_engine():
        logger.warning("Transformer Engine is not installed: Megatron-Bridge is imported with a stub in its place.")
    with _quietly():
        return importlib.import_module("megatron.bridge") if has_transformer_engine() else _import_with_stub()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the tracebacks of Bridge's optional imports out of the log, and the root logger at its level."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    level = root.level
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)


def _import_with_stub() -> types.ModuleType:
    # These decide at import whether Transformer Engine exists; megatron-core 0.19 would believe the stub.
    for name in (
        "extensions.transformer_engine", "transformer.attention", "models.gpt.gpt_layer_specs", "optimizer",
        "distributed", "transformer.multi_latent_attention",
    ):  # fmt: skip
        importlib.import_module(f"megatron.core.{name}")
    with _transformer_engine_stub():
        bridge = importlib.import_module("megatron.bridge")
        peft_utils = importlib.import_module("megatron.bridge.peft.utils")
    peft_utils.HAVE_TE = False
    return bridge


def local_block_spec(provider: Any, vp_stage: int | None = None) -> Any:
    """Return Megatron's own (non Transformer Engine) layers for this stage, with norms that allow more than theirs."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.identity_op import IdentityOp

    has_latent_heads = provider.multi_latent_attention
    block = get_gpt_decoder_block_spec(
        provider, use_transformer_engine=False, normalization=provider.normalization, vp_stage=vp_stage
    )
    block.layer_norm = _local_norm
    for layer in block.layer_specs:
        if has_latent_heads:
            layer.submodules.self_attention.submodules.core_attention = _latent_attention()
        for holder in (layer.submodules, layer.submodules.self_attention.submodules):
            for name, value in vars(holder).items():
                if getattr(value, "__name__", "") == "WrappedTorchNorm":
                    is_unused = name == "q_layernorm" and has_latent_heads and provider.q_lora_rank is None
                    setattr(holder, name, IdentityOp if is_unused else _local_norm)
    return block


@functools.cache
def _latent_attention() -> type:
    """Return Megatron's own attention for latent heads, whose keys and values differ in width; it has none."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class LocalMLAttention(DotProductAttention):
        def __init__(self, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any):
            super().__init__(*args, **kwargs)
            if v_channels is not None:  # Megatron builds it twice, first without
                self.hidden_size_per_partition = self.num_attention_heads_per_partition * v_channels

    return LocalMLAttention


class LocalNorm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last dimension, as Transformer Engine computes them.

    RMSNorm: x / sqrt(mean(x^2) + eps) * g; LayerNorm: (x - mean) / sqrt(var + eps) * g + bias; g = weight, or
    1 + weight with zero_centered_gamma. Megatron's WrappedTorchNorm refuses that and sequence parallelism.
    """

    def __init__(self, hidden_size: int, eps: float, normalization: str, zero_centered_gamma: bool, is_sharded: bool):
        super().__init__()
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.full((hidden_size,), 0.0 if zero_centered_gamma else 1.0))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size)) if normalization == "LayerNorm" else None
        for parameter in self.parameters():
            parameter.sequence_parallel = is_sharded  # type: ignore[attr-defined]  # gradients are summed over tp

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed activations, same shape and dtype as x."""
        return apply_norm(
            x, self.weight, self.bias, self.eps, self.normalization, zero_centered_gamma=self.zero_centered_gamma
        )


def apply_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, normalization: str, *, zero_centered_gamma: bool
) -> Tensor:
    """Return the norm that Transformer Engine fuses into a linear, computed in float32; (..., I) as x, dtype of x."""
    gain = weight.float() + 1 if zero_centered_gamma else weight.float()
    if normalization == "RMSNorm":
        normed = torch.nn.functional.rms_norm(x.float(), (x.shape[-1],), gain, eps)
    else:
        offset = None if bias is None else bias.float()
        normed = torch.nn.functional.layer_norm(x.float(), (x.shape[-1],), gain, offset, eps)
    return normed.to(x.dtype)


def _local_norm(config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> LocalNorm:
    return LocalNorm(
        hidden_size, eps, config.normalization, config.layernorm_zero_centered_gamma, config.sequence_parallel
    )


def _patch_cuda_calls() -> list[str]:
    """Point megatron-core's hard-wired CUDA calls at the CPU; return what was changed, for the log."""
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
    schedules.torch = megatron_utils.torch = _TorchOnCpu(torch)  # they ask for device="cuda"
    megatron_random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = _as_numpy
    return ["torch.cuda device, stream and copy calls", "pipeline schedule counters", "random state tracker"]


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
    """The torch module with `zeros` and `ones` on the CPU, for modules of Megatron that ask for device="cuda"."""

    def __init__(self, module: Any):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def zeros(self, *size: Any, **kwargs: Any) -> Tensor:
        return self._module.zeros(*size, **_on_cpu(kwargs))

    def ones(self, *size: Any, **kwargs: Any) -> Tensor:
        return self._module.ones(*size, **_on_cpu(kwargs))


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "device": "cpu"} if kwargs.get("device") == "cuda" else kwargs


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    # Megatron turns split sizes into numpy only when they come from a GPU; gloo wants integers, not tensors.
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


class _StubModule(types.ModuleType):
    """A module of which every capitalised name is an empty class and every other name a submodule."""

    __path__: list[str] = []  # noqa: RUF012
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[:1].isupper():
            value: Any = type(name, (), {"__module__": self.__name__})
        else:
            value = importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.split(".")[0] in (_STUBBED, f"{_STUBBED}_torch"):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextlib.contextmanager
def _transformer_engine_stub() -> Iterator[None]:
    """Answer imports of Transformer Engine inside the block; afterwards it is absent again for everybody else."""
    finder = _StubFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] in (_STUBBED, f"{_STUBBED}_torch")]:
            del sys.modules[name]
