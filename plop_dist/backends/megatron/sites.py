"""How Megatron's linears are observed: column, row and expert linears, fused norms, biases, and the routing map."""

# T tokens, I in_features, O out_features, E experts

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from plop_dist.backends.megatron.classes import changes_output, known_base, known_router
from plop_dist.backends.megatron.groups import Place
from plop_dist.backends.megatron.modules import bias_of, fused_norm, grouped, weight_name, weight_of
from plop_dist.backends.megatron.norm import apply_norm
from plop_dist.measure.blocks import Block
from plop_dist.measure.norms import local_sq_norm
from plop_dist.measure.protocols import LocalWeight, Part, Recorder, Routing
from plop_dist.measure.weight import Stored, find_weight
from plop_dist.values.scores import Projection


class MegatronSite:
    """A Megatron linear: reads z, returns (W z (+ bias), bias or None).

    blocks: the projections in this rank's output rows. kind: see names.linear_kind. place: this rank's among those that
    shard it, None for a single one. weight: gives the weight where it is not the module's own. num_rows: how many local
    output rows are real, where a vocabulary is padded. called: the adapter's wrapper around the module, if there is
    one, whose output holds the adapter's part.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[Block],
        kind: str,
        place: Place | None = None,
        *,
        weight: Callable[[], Tensor] | None = None,
        num_rows: int | None = None,
        called: nn.Module | None = None,
    ) -> None:
        self._called = called or module
        self.module, self.blocks, self.kind = module, tuple(blocks), kind
        self.projections: tuple[Projection, ...] = tuple(block.projection for block in blocks)
        self.group, self.holder = "tp", None
        self.num_calls: int | None = None  # since it was attached, None while it is not
        self._tp_rank, self._tp_size = (place.tp_rank, place.tp_size) if place else (0, 1)
        self._weight = weight or (lambda: weight_of(module))
        self._num_rows = num_rows
        partial = Part.PARTIAL if self._tp_size > 1 else Part.WHOLE
        tokens = Part.TOKENS if place is not None and place.is_sequence_parallel else Part.WHOLE
        self._in_part, self._out_part = {
            "column": (tokens, partial), "row": (partial, tokens), "duplicated": (tokens, tokens),
        }[kind]  # fmt: skip

    def attach(self, recorder: Recorder) -> Callable[[], None]:
        """Install the hook and return the function that removes it."""
        self.num_calls = 0

        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.num_calls = (self.num_calls or 0) + 1
            z = _first(args, kwargs)
            y = self._own_rows(_without_bias(self.module, output))
            recorder.record(
                self,
                _in_sq(self.module, z, recorder),
                [local_sq_norm(block.take(y)) for block in self.blocks],
                in_part=self._in_part,
                out_part=self._out_part,
                leading_shape=z.shape[:-1],
            )

        if changes_output(self.module):
            detach = _watch_base(self.module, observe, cast(type[nn.Module], known_base(self.module)), "forward")
        else:
            detach = self._called.register_forward_hook(observe, prepend=True, with_kwargs=True).remove

        def remove() -> None:
            detach()
            self.num_calls = None

        return remove

    @contextmanager
    def weights(self) -> Iterator[Iterator[LocalWeight]]:
        """Give access to one LocalWeight per projection; nothing is communicated."""
        weight = find_weight(Stored(self.module, whole=self._weight().detach(), path=self.projections[0].fqn))
        num_rows, width = weight.shape
        if self._num_rows is not None:
            weight = weight.narrow(0, min(self._num_rows, num_rows))
        in_index = None
        if self.kind == "row" and self._tp_size > 1:
            in_index = slice(self._tp_rank * width, (self._tp_rank + 1) * width)
        is_sharded = self._tp_size > 1 and self.kind != "duplicated"
        yield (LocalWeight(block.projection, block.take_weight(weight), is_sharded, in_index) for block in self.blocks)

    def _own_rows(self, y: Tensor) -> Tensor:
        """Return this rank's real output features: of a gathered output its own part, without vocabulary padding."""
        width = self._weight().shape[0]
        if self.kind == "column" and y.shape[-1] != width:
            y = y.narrow(-1, self._tp_rank * width, width)
        return y if self._num_rows is None else y[..., : self._num_rows]


class RoutedSite:
    """One routed expert's linear; its tokens come from any rank of the routing group, in the router's order.

    slot: its place in a grouped linear, whose forward takes (z of all experts one after the other, tokens per expert).
    splits: shared by the sites of one grouped linear.
    """

    group, holder = "etp", None

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[Block],
        routing: Routing,
        slot: int | None = None,
        splits: Splits | None = None,
    ) -> None:
        self.module, self.blocks, self.routing, self.slot = module, tuple(blocks), routing, slot
        self._splits = splits or Splits()
        self.projections: tuple[Projection, ...] = tuple(block.projection for block in blocks)

    def attach(self, recorder: Recorder) -> Callable[[], None]:
        """Install the hook and return the function that removes it."""

        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            z_TI = _first(args, kwargs)
            y_TO = output[0] if isinstance(output, tuple) else output
            if self.slot is None:
                y_TO = _without_bias(module, output)
            else:
                bounds = self._splits.bounds(args[1] if len(args) > 1 else kwargs["m_splits"])
                start, stop = bounds[self.slot], bounds[self.slot + 1]
                z_TI, y_TO = z_TI[start:stop], y_TO[start:stop]
                linear = grouped(module)
                if not getattr(linear, "te_return_bias", True) and linear.use_bias:
                    y_TO = y_TO - getattr(module, f"bias{self.slot}")
            recorder.record(
                self,
                local_sq_norm(z_TI),
                [local_sq_norm(block.take(y_TO)) for block in self.blocks],
                routing=self.routing,
            )

        return self.module.register_forward_hook(observe, prepend=True, with_kwargs=True).remove

    @contextmanager
    def weights(self) -> Iterator[Iterator[LocalWeight]]:
        """Give access to one LocalWeight per projection; nothing is communicated."""
        weight = find_weight(Stored(self.module, weight_name(self.slot), path=self.projections[0].fqn))
        yield (LocalWeight(block.projection, block.take_weight(weight)) for block in self.blocks)


class Splits:
    """Where each expert's tokens begin in what a grouped linear reads: worked out once a call, for all its experts."""

    def __init__(self) -> None:
        self._of: Any = None
        self._bounds = [0]

    def bounds(self, splits: Any) -> list[int]:
        """Return the first token of every expert and the end of the last. splits: tokens per expert, as the call."""
        if splits is not self._of:
            sizes = splits.tolist() if torch.is_tensor(splits) else splits
            self._of, self._bounds = splits, [0, *accumulate(map(int, sizes))]
        return self._bounds


class RouterSite:
    """A layer's router: a linear of its own, and what tells which tokens go to which experts.

    is_scored: whether its own norms count, or only where it sends tokens.
    Every tensor rank holds the whole weight; under sequence parallelism it reads this rank's share of the tokens.
    """

    group, holder = "tp", None

    def __init__(
        self,
        module: nn.Module,
        name: str,
        projection: Projection,
        *,
        is_sequence_parallel: bool = False,
        is_scored: bool = True,
    ) -> None:
        self.module, self.name, self._is_scored = module, name, is_scored
        self.projections: tuple[Projection, ...] = (projection,)
        self._part = Part.TOKENS if is_sequence_parallel else Part.WHOLE

    def attach(self, recorder: Recorder) -> Callable[[], None]:
        """Install the observation and return the function that removes it. The map is the one after capacity drops."""
        module: Any = self.module

        def observe_gating(_: nn.Module, args: Any, kwargs: Any, logits: Tensor) -> None:
            z = _first(args, kwargs)
            recorder.record(
                self,
                recorder.sq_norm(z),
                [local_sq_norm(logits if module.bias is None else logits - module.bias)],
                in_part=self._part,
                out_part=self._part,
                leading_shape=z.shape[:-1],
            )

        def observe(module: nn.Module, args: Any, output: Any) -> None:
            recorder.record_routing(self.name, output[1].bool())

        handles = [module.register_forward_hook(observe, prepend=True).remove]
        if self._is_scored:  # the router returns probabilities, its logits are seen nowhere else
            handles.append(_watch_base(module, observe_gating, known_router(module), "gating"))

        def remove() -> None:
            for handle in handles:
                handle()

        return remove

    @contextmanager
    def weights(self) -> Iterator[Iterator[LocalWeight]]:
        """Give access to the router's weight; nothing is communicated."""
        projection = self.projections[0]
        yield iter([LocalWeight(projection, find_weight(Stored(self.module, path=projection.fqn)))])


def _watch_base(
    module: nn.Module, observe: Callable[..., None], base: type[nn.Module], method: str
) -> Callable[[], None]:
    """Have `observe` called like a forward hook with what a method of one of the module's classes reads and returns.

    Returns the function that undoes it. What a subclass makes of z, or of W z, happens around the call of its
    super()'s method, so a class is put between the two: there is no hook at that place.
    """
    own: Any = type(module)
    original: Any = getattr(base, method)

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        observe(self, args, kwargs, output)
        return output

    between: Any = type(base.__name__, (base,), {method: watched, "__module__": base.__module__})
    bases = (between,) if own is base else (own, between)
    module.__class__ = type(own.__name__, bases, {"__module__": own.__module__})

    def remove() -> None:
        module.__class__ = own

    return remove


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _in_sq(module: nn.Module, z: Tensor, recorder: Recorder) -> Tensor:
    """Return ||z_t||^2 of what the weight really multiplies: a LayerNorm-fused linear is given the pre-norm input."""
    norm = fused_norm(module)
    if norm is None:
        return recorder.sq_norm(z)
    normed = apply_norm(
        z,
        norm.layer_norm_weight,
        getattr(norm, "layer_norm_bias", None),
        norm.eps,
        norm.normalization,
        zero_centered_gamma=norm.zero_centered_gamma,
    )
    return local_sq_norm(normed)


def _without_bias(module: nn.Module, output: Any) -> Tensor:
    """Return W z: a bias that comes back apart was not added, any other was."""
    y, returned = output if isinstance(output, tuple) else (output, None)
    bias = bias_of(module)
    return y if returned is not None or bias is None else y - bias
