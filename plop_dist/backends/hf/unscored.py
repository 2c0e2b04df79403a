"""Which weights multiply activations though no site holds them: seen by what torch is asked for in a forward pass.

Not told by classes or names, so that experts stored in a manner of their own, weights that no module owns and linears
of foreign classes are found as well; position tables and learned queries, which are added or looked up, are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from plop_dist.backends.hf.expert_kinds import experts_module
from plop_dist.backends.hf.linears import is_linear, projection_of
from plop_dist.backends.hf.own_modules import named_modules, parameter_shape
from plop_dist.values.scores import Projection

# What sums over a dimension of both its arguments.
_PRODUCTS = frozenset({"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addbmm", "baddbmm",
                       "addmv", "einsum", "tensordot", "bilinear", "inner", "_grouped_mm", "grouped_mm", "_scaled_mm",
                       "scaled_mm", "linalg_matmul", "linalg_multi_dot", "multi_head_attention_forward", "lstm", "gru",
                       "rnn_tanh", "rnn_relu"})  # fmt: skip
# What gives the values of its first argument in other memory.
_COPIES = frozenset({"to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone"})


@contextmanager
def watching(model: nn.Module, scored: Iterable[nn.Module | None] = ()) -> Iterator[list[Projection]]:
    """Give a list that holds, after the block, the weights that the model's forward passes in it have multiplied by.

    Those of linears and experts of known kinds, of embeddings tied to them, and of the scored modules are not in it,
    which may be of classes that a framework has put in the place of the known ones (AutoTP).
    """
    found: list[Projection] = []
    unknown = _unknown_weights(model, [module for module in scored if module is not None])
    if not unknown:
        yield found
        return
    with ExitStack() as stack:
        watch = _Watch()
        for path, (module, name) in unknown.items():
            watch.expect(path, module, name)
            # FSDP puts other parameters into the module while its forward runs.
            hook = module.register_forward_pre_hook(partial(_expect_again, watch, path, name))
            stack.callback(hook.remove)
        with watch:
            yield found
        found += [_projection(path, shape) for path, shape in watch.multiplied.items()]


def _expect_again(watch: _Watch, path: str, name: str, module: nn.Module, _args: Any) -> None:
    watch.expect(path, module, name)


class _Watch(TorchFunctionMode):
    """Notes which of the expected parameters torch multiplies by: their paths and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplied: dict[str, tuple[int, ...]] = {}
        self._parameters: dict[str, Tensor] = {}
        self._expected: dict[int, str] = {}
        self._copies: dict[int, tuple[Tensor, str]] = {}  # kept, so that no other tensor gets their ids

    def expect(self, path: str, module: nn.Module, name: str) -> None:
        """Look out for a parameter of the module's."""
        parameter = getattr(module, name)
        self._parameters[path] = parameter
        self._expected[id(parameter)] = path

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS:
            for tensor in _tensors((*args, *(kwargs or {}).values())):
                if (path := self._path(tensor)) is not None:
                    self.multiplied[path] = parameter_shape(self._parameters[path])
        elif name in _COPIES and isinstance(result, Tensor) and (path := self._path(args[0])) is not None:
            self._copies[id(result)] = (result, path)
        return result

    def _path(self, tensor: Any) -> str | None:
        """Return the path of the expected parameter of which a tensor is a view or a copy, or a view of a copy."""
        for one in (tensor, tensor._base):
            if id(one) in self._expected:
                return self._expected[id(one)]
            if id(one) in self._copies:
                return self._copies[id(one)][1]
        return None


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _unknown_weights(model: nn.Module, scored: Sequence[nn.Module]) -> dict[str, tuple[nn.Module, str]]:
    """Return the parameters of two dimensions or more that belong to no linear and no experts of a known kind.

    By path; module and name.
    """
    modules = named_modules(model)
    linears = [*scored, *(module for module in modules.values() if is_linear(module))]
    held = {id(one) for module in linears for one in module.parameters(recurse=False)}
    # What a linear's weight is made of (torch.nn.utils.parametrize) is multiplied by on the way to it.
    made_of = [module.get_submodule("parametrizations") for module in linears if is_parametrized(module)]
    held |= {id(one) for parts in made_of for one in parts.parameters()}
    return {
        f"{path}.{name}".removeprefix("."): (module, name)
        for path, module in modules.items()
        for name, parameter in module.named_parameters(recurse=False)
        if len(parameter_shape(parameter)) > 1
        and id(parameter) not in held
        and experts_module(path, module, modules) is None
    }


def _projection(path: str, shape: tuple[int, ...]) -> Projection:
    """Return what a report calls the weight; which of its sizes is which is not known."""
    *_, out_features, in_features = shape
    return projection_of(path.removesuffix(".weight"), in_features, out_features, "other", path)
