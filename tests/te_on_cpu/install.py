"""Transformer Engine's own Python classes on a CPU: only their CUDA kernels are replaced, by torch functions.

Constructors, attributes, parameters, parallel modes and Megatron's wrappers around them are those of the real package,
so that Megatron builds its GPU layer specification and Bridge its GPU providers. Kernels, FP8, streams and gradients
that Transformer Engine's own backward computes otherwise than autograd are not seen here.

    python -m tests.te_on_cpu.install score CONFIG parallel.backend=megatron    # any command, also under torchrun
"""

from __future__ import annotations

import enum
import os
import re
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SITE = Path(__file__).parents[2] / ".cache" / "te_on_cpu" / "transformer-engine"
needs_te = pytest.mark.skipif(
    not (SITE / ".installed").exists(), reason="Transformer Engine's Python package is not installed (make test)"
)
each_specification = pytest.mark.parametrize(
    "specification", ["local", pytest.param("transformer_engine", marks=needs_te)]
)
# For what adds ranks or layouts to what is already shown with both.
each_specification_rarely = pytest.mark.parametrize(
    "specification", ["local", pytest.param("transformer_engine", marks=[needs_te, pytest.mark.rare])]
)


def specified(rank: int, specification: str, function: Callable[..., Any], *args: Any) -> Any:
    """Return function(rank, *args) in a process where Megatron builds the layers of that specification."""
    if specification == "transformer_engine":
        install()
    return function(rank, *args)


def install() -> None:
    """Make `transformer_engine` importable, before the first import of megatron. Twice is once."""
    if "transformer_engine.pytorch" in sys.modules:
        return
    assert "megatron.core" not in sys.modules, "megatron decides at import whether Transformer Engine exists"
    sys.path.insert(0, str(SITE))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its shared library stays unloaded
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Only its export to ONNX needs onnxscript.
    onnx = "transformer_engine.pytorch.onnx_extensions"
    sys.modules.setdefault(onnx, _AnyModule(onnx))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its shared library is not there
        import transformer_engine.common as common  # pyright: ignore[reportMissingImports]

        common.load_framework_extension = lambda _: sys.modules.update(transformer_engine_torch=_extension())
        import transformer_engine.pytorch  # pyright: ignore[reportMissingImports]  # noqa: F401

    from tests.te_on_cpu import forward, state_space

    forward.patch()
    state_space.install()


class _Anything:
    """Stands for any constant of the extension module; a call of it is a kernel that nobody replaced."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, key: str) -> _Anything:
        if key.startswith("__"):
            raise AttributeError(key)
        return _Anything(f"{self._name}.{key}")

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"a CUDA kernel was called: {self._name}")

    def __hash__(self) -> int:
        return hash(self._name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Anything) and other._name == self._name

    def __index__(self) -> int:
        return 0

    __int__ = __index__


class _AnyModule(types.ModuleType):
    def __getattr__(self, key: str) -> _Anything:
        if key.startswith("__"):
            raise AttributeError(key)
        return _Anything(f"{self.__name__}.{key}")


def _extension() -> types.ModuleType:
    """Return what stands for the module of kernels: the constants that the Python side reads when it is imported."""
    module: Any = _AnyModule("transformer_engine_torch")
    module.__file__ = __file__
    types_ = {"kByte": 0, "kInt32": 2, "kFloat32": 4, "kFloat16": 5, "kBFloat16": 6, "kFloat8E4M3": 7, "kFloat8E5M2": 8,
              "kFloat4E2M1": 10}  # fmt: skip
    module.DType = enum.IntEnum("DType", types_)
    forward = [f"GEMM{number}_{kind}" for number in (1, 2, 3) for kind in ("INPUT", "WEIGHT", "OUTPUT")]
    backward = [f"GRAD_{kind}{number}" for number in (1, 2, 3) for kind in ("OUTPUT", "INPUT")]
    module.FP8FwdTensors = enum.IntEnum("FP8FwdTensors", forward, start=0)
    module.FP8BwdTensors = enum.IntEnum("FP8BwdTensors", backward, start=0)
    module.CommOverlapType = enum.Enum("CommOverlapType", ["RS", "AG"])
    source = (SITE / "transformer_engine/pytorch/cpp_extensions/fused_attn.py").read_text()
    names = re.findall(r"^    (\w+) = ", source.split("class FusedAttnBackend")[1].split("@classmethod")[0], re.M)
    backends = {f"NVTE_{name}": number for number, name in enumerate(names)}
    module.NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", backends)
    module.get_cudnn_version = lambda: 92000
    module.get_num_cublas_streams = lambda: 4
    for name in ("CommOverlapHelper", "CommOverlap", "CommOverlapP2P", "CommOverlapBase", "CommOverlapP2PBase"):
        setattr(module, name, type(name, (), {}))
    return module


if __name__ == "__main__":
    install()
    from plop_dist.cli import main

    sys.argv[0] = "plop-dist"
    main()
