"""Whether Transformer Engine is installed, and a stub in its place while Megatron-Bridge is imported.

Which layers are built depends on this alone, never on CUDA: with Transformer Engine the GPU ones, without it Megatron's
own.
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

from plop_dist.errors import first_line

logger = logging.getLogger(__name__)

_PACKAGE = "transformer_engine"


@functools.cache
def has_transformer_engine() -> bool:
    """Tell whether the real Transformer Engine can be imported; asked before Megatron is.

    One that is installed and cannot be imported (the package alone, without its library for torch) is absent from here
    on for everybody, since Megatron itself would not get past it; the log says so.
    """
    if importlib.util.find_spec(_PACKAGE) is None:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(f"{_PACKAGE}.pytorch")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        logger.warning(
            "Transformer Engine is installed but cannot be imported (%s: %s): Megatron's own layers are built.",
            type(error).__name__, first_line(error),
        )  # fmt: skip
        _forget()
        sys.modules[_PACKAGE] = None  # type: ignore[assignment]  # Python's own sign for what is not to be found
        return False
    return True


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """Answer imports of Transformer Engine inside the block; afterwards it is absent again for everybody else."""
    is_hidden = _PACKAGE in sys.modules
    _forget()
    finder = _StubFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _forget()
        if is_hidden:
            sys.modules[_PACKAGE] = None  # type: ignore[assignment]


def _forget() -> None:
    for name in [name for name in sys.modules if _is_of_package(name)]:
        del sys.modules[name]


def _is_of_package(module: str) -> bool:
    return module.split(".")[0] in (_PACKAGE, f"{_PACKAGE}_torch")


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
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if _is_of_package(fullname) else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass
