"""Keeps a host's modules and random states exactly as they are while something else runs the model."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

_Undo = Callable[[], None]


@contextmanager
def undisturbed(roots: Sequence[nn.Module]) -> Iterator[None]:
    """Run the block in eval mode without gradients, and leave modes, buffers and random states as they were.

    roots: everything below them is switched to eval, each submodule back to its own mode. Random states: python,
    numpy, torch (CPU and the modules' GPUs), and the trackers of Megatron and DeepSpeed. What torch.compile has
    compiled is passed by: it runs without hooks that came later. Local.
    """
    modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
    undo = [*_random_states(modules), *(_buffers(module) for module in modules)]
    training = [module.training for module in modules]
    try:
        # The attribute and not eval(): an engine's or an adapter's own eval() may do more than that.
        for module in modules:
            module.training = False
        # Weights that FSDP gathers in inference mode would be unfit for the host's next step.
        with torch.inference_mode(False), torch.no_grad(), _uncompiled():
            yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
        for restore in undo:
            restore()


def _uncompiled() -> AbstractContextManager[Any]:
    # Only where something is compiled: importing the compiler takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _random_states(modules: Sequence[nn.Module]) -> list[_Undo]:
    undo: list[_Undo] = []
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    undo += [lambda: random.setstate(python), lambda: np.random.set_state(numpy), lambda: torch.set_rng_state(cpu)]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        on = {torch.cuda.current_device()}
        on |= {parameter.device.index for module in modules for parameter in module.parameters(recurse=False)
               if parameter.device.type == "cuda"}  # fmt: skip
        for device in on:
            state = torch.cuda.get_rng_state(device)
            undo.append(lambda device=device, state=state: torch.cuda.set_rng_state(state, device))
    return undo + [_tracker(name) for name in _TRACKERS if name in sys.modules]


# Modules whose get_cuda_rng_tracker() holds the random states of tensor-parallel dropout.
_TRACKERS = ("megatron.core.tensor_parallel.random", "deepspeed.runtime.activation_checkpointing.checkpointing")


def _tracker(module_name: str) -> _Undo:
    tracker: Any = sys.modules[module_name].get_cuda_rng_tracker()
    saved = {
        name: state.get_state() if isinstance(state, torch.Generator) else state.clone()
        for name, state in tracker.get_states().items()
    }

    def restore() -> None:
        states = tracker.get_states()
        for name, state in states.items():
            # A CUDA graph may hold the generator object itself: it is set, never replaced.
            if isinstance(state, torch.Generator) and name in saved:
                state.set_state(saved[name])
        tracker.set_states(
            {name: states[name] if isinstance(states.get(name), torch.Generator) else saved[name] for name in saved}
        )

    return restore


def _buffers(module: nn.Module) -> _Undo:
    """Return what puts back a module's buffers, by object and by content: rotary frequencies may grow with length."""
    kept = [
        (name, buffer, None if buffer is None else buffer.detach().clone()) for name, buffer in module._buffers.items()
    ]
    longest = vars(module).get("max_seq_len_cached")

    def restore() -> None:
        for name, buffer, content in kept:
            module._buffers[name] = buffer
            if buffer is not None and content is not None and not _same(buffer, content):
                buffer.copy_(content)
        if longest is not None:
            module.max_seq_len_cached = longest  # type: ignore[assignment]

    return restore


def _same(buffer: torch.Tensor, content: Any) -> bool:
    return buffer.shape == content.shape and torch.equal(buffer, content)
