"""Megatron-Bridge, imported: at a version that loads right weights, with or without CUDA and Transformer Engine."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import types
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from plop_dist.backends.megatron import cpu
from plop_dist.backends.megatron.transformer_engine import has_transformer_engine, stubbed
from plop_dist.errors import MissingExtraError

logger = logging.getLogger(__name__)

_INSTALL = (
    "Python 3.12, pip install 'plop-dist[megatron]' and then pip install --no-deps 'megatron-bridge>=0.6,<0.7' "
    "(its optional dependencies are not needed)"
)


def import_auto_bridge() -> Any:
    """Return Megatron-Bridge's AutoBridge. Raises MissingExtraError saying what to install."""
    for package, minimum in (("megatron-core", (0, 18)), ("megatron-bridge", (0, 6))):
        try:
            found = version(package)
        except PackageNotFoundError:
            raise MissingExtraError(
                f"parallel.backend megatron needs {package}, which is not installed: {_INSTALL}"
            ) from None
        if tuple(int(part) for part in found.split(".")[:2]) < minimum:
            wanted = ".".join(map(str, minimum))
            raise MissingExtraError(
                f"parallel.backend megatron needs {package} {wanted} or newer, and {found} is installed (older ones "
                f"load wrong weights with transformers 5): {_INSTALL}"
            )
    try:
        return import_bridge().AutoBridge
    except ImportError as error:
        raise MissingExtraError(f"Megatron-Bridge cannot be imported ({error}): {_INSTALL}") from error


def import_bridge() -> Any:
    """Return the module megatron.bridge, imported under a stub where Transformer Engine is absent.

    megatron-core is imported before the stub, so that it keeps its local layers. Raises ImportError.
    """
    has_transformer_engine()  # before Megatron asks
    importlib.import_module("megatron.core")
    if not torch.cuda.is_available():
        cpu.prepare()
    if "megatron.bridge" in sys.modules:
        return sys.modules["megatron.bridge"]
    if not has_transformer_engine():
        logger.warning("Transformer Engine is not installed: Megatron-Bridge is imported with a stub in its place.")
    with _quietly():
        bridge = importlib.import_module("megatron.bridge") if has_transformer_engine() else _import_with_stub()
    if not torch.cuda.is_available():
        cpu.prepare_bridge()
    return bridge


def _import_with_stub() -> types.ModuleType:
    # These decide at import whether Transformer Engine exists; megatron-core 0.19 would believe the stub.
    for name in (
        "extensions.transformer_engine", "transformer.attention", "models.gpt.gpt_layer_specs", "optimizer",
        "distributed", "transformer.multi_latent_attention",
    ):  # fmt: skip
        importlib.import_module(f"megatron.core.{name}")
    with stubbed():
        bridge = importlib.import_module("megatron.bridge")
        peft_utils: Any = importlib.import_module("megatron.bridge.peft.utils")
    peft_utils.HAVE_TE = False
    return bridge


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
