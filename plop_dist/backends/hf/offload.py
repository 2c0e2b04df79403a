"""Weights that accelerate keeps on disk or in the CPU's memory between forward passes, and brings while a module runs.

Between the passes such a parameter is on the meta device. Its values are looked at when they are there anyway, so that
a pass over the samples reads the checkpoint once, or fetched where no forward pass has come by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plop_dist.backends.hf.memory import freed_at_once
from plop_dist.measure.protocols import Site
from plop_dist.measure.weight import Gather


def _nothing(*_: Any) -> None:
    pass


class OffloadedWeights:
    """The PassingWeights of a model that accelerate has dispatched: those that are elsewhere between passes."""

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self._sites_of = _sites_of_hooks(model, sites)
        self.sites: Sequence[Site] = [site for _, own in self._sites_of for site in own]

    def attach(self, take: Callable[[Site], None]) -> Callable[[], None]:
        """Have take(site) called whenever a site's weights are there; returns the function that ends it."""
        stack = ExitStack()
        stack.enter_context(freed_at_once())  # what a layer leaves behind would add up to the model
        for hook, own in self._sites_of:
            stack.callback(_call_before_they_go(hook, own, take))
        return stack.close


def is_offloaded(model: nn.Module) -> bool:
    """Tell whether accelerate keeps any of the model's weights elsewhere between forward passes."""
    return any(True for _ in _offloading_hooks(model))


def is_away(module: Any) -> bool:
    """Tell whether a module's own parameters are on the meta device until accelerate brings them for its forward."""
    return hasattr(module, "_old_forward") and any(_hooks_of(module))


def while_there(
    module: Any, *, before: Callable[..., Any] = _nothing, after: Callable[..., Any] = _nothing
) -> Callable[[], None]:
    """Observe a forward of a module that is_away, from inside: around it hooks find no weights. Returns what ends it.

    before(module, args); after(module, args, kwargs, output).
    """
    plain = module._old_forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        before(module, args)
        output = plain(*args, **kwargs)
        after(module, args, kwargs, output)
        return output

    def remove() -> None:
        module._old_forward = plain

    module._old_forward = _Observed(forward, plain)
    return remove


class _Observed:
    """A module's forward with observers around it, which still tells whose method it is."""

    def __init__(self, forward: Callable[..., Any], plain: Any) -> None:
        self._forward = forward
        self.__func__ = getattr(plain, "__func__", plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


def execution_device(model: nn.Module) -> torch.device:
    """Return where a model computes: where its first parameter is, or is brought to."""
    parameter = next(model.parameters())
    if not parameter.is_meta:
        return parameter.device
    for hook, _ in _offloading_hooks(model):
        device = hook.execution_device
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return parameter.device


def fetched(model: nn.Module) -> Gather:
    """Return what gives the values of offloaded parameters outside of a forward pass, and others as they are. Local."""

    @contextmanager
    def gather(parameters: Sequence[nn.Parameter]) -> Iterator[Sequence[Tensor]]:
        yield [_value(model, parameter) if parameter.is_meta else parameter for parameter in parameters]

    return gather


def _value(model: nn.Module, parameter: nn.Parameter) -> Tensor:
    for hook, module in _offloading_hooks(model):
        for name, own in module.named_parameters(recurse=hook.place_submodules):
            if own is parameter:
                return hook.weights_map[name]
    return parameter


def _offloading_hooks(model: nn.Module) -> Iterator[tuple[Any, nn.Module]]:
    for module in model.modules():
        for hook in _hooks_of(module):
            yield hook, module


def _hooks_of(module: Any) -> Iterator[Any]:
    """Yield accelerate's hooks on a module that bring weights; a module that it never saw has none."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):  # a SequentialHook holds several
        if getattr(one, "offload", False) and getattr(one, "weights_map", None) is not None:
            yield one


def _sites_of_hooks(model: nn.Module, sites: Sequence[Site]) -> list[tuple[Any, list[Site]]]:
    by_module: dict[int, list[Site]] = {}
    for site in sites:
        by_module.setdefault(id(getattr(site, "holding_module", None)), []).append(site)
    found = []
    for hook, module in _offloading_hooks(model):
        held = module.modules() if hook.place_submodules else (module,)
        own = [site for part in held for site in by_module.get(id(part), ())]
        if own:
            found.append((hook, own))
    return found


def _call_before_they_go(hook: Any, own: Sequence[Site], take: Callable[[Site], None]) -> Callable[[], None]:
    """Have the sites taken at the end of a module's forward, before its hook sends the weights away again."""
    plain = hook.post_forward

    def post_forward(module: nn.Module, output: Any) -> Any:
        for site in own:
            take(site)
        return plain(module, output)

    hook.post_forward = post_forward
    return lambda: vars(hook).pop("post_forward", None)
