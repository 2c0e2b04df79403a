"""How a linear module is observed: one hook that notes the squared norms of its input and of its output."""

# T tokens, I in_features, O out_features

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from plop_dist.backends.hf.computed_weights import Product, has_own_forward, is_computed, note_products
from plop_dist.backends.hf.linears import LinearModule
from plop_dist.backends.hf.offload import is_away, while_there
from plop_dist.errors import ModelError
from plop_dist.measure.blocks import Block
from plop_dist.measure.norms import local_sq_norm
from plop_dist.measure.protocols import LocalWeight, Part, Recorder
from plop_dist.measure.weight import Gather, Stored, find_weight, is_dense, local

_ROUNDING = 0.02  # of the norm of W z: what 16 bits and another order of summation may change
_ROUTER = re.compile(r"[rR]outer$")  # of experts: returns scores, and is read by what it multiplies by


class LinearSite:
    """A module that reads z as its first argument and returns W z (+ bias), or a tuple that begins with it.

    A module that an adapter wraps is observed around the wrapper, so that the gain is that of both together; the weight
    is the wrapped one's.

    blocks: the logical projections inside it. in_part and out_part: WHOLE, or PARTIAL where this rank sees a shard of
    the features. bias_in_output: whether the output holds the module's bias (which is not part of the gain).
    is_sharded and in_index describe its weight as LocalWeight does. gather: gives whole parameters where they are
    partitioned between forwards (ZeRO-3, FSDP). observe_last: after the hooks that a framework put on the module, where
    those complete its output (transformers' row-parallel sum).
    """

    def __init__(
        self,
        linear: LinearModule,
        *,
        group: str = "tp",
        in_part: Part = Part.WHOLE,
        out_part: Part = Part.WHOLE,
        is_sharded: bool = False,
        in_index: slice | Tensor | None = None,
        gather: Gather | None = None,
        observe_last: bool = False,
    ) -> None:
        self.path, self.module, self._adapter = linear.path, linear.module, linear.adapter
        self._base: Any = wrapped(linear.module)
        self.holding_module = self._base
        self.blocks: Sequence[Block] = linear.blocks
        self.projections = tuple(block.projection for block in linear.blocks)
        self.group, self.holder = group, None
        self._in_part, self._out_part = in_part, out_part
        self._is_sharded, self._in_index = is_sharded, in_index
        self._gather = gather
        self._observe_last = observe_last
        # A router may return scores, a quantised linear may round or normalise first: what torch is asked to multiply
        # counts, or where that is not seen, the output is believed once it is W z.
        is_whole = in_part is Part.WHOLE and out_part is Part.WHOLE
        is_known = not has_own_forward(linear.module) and is_dense(Stored(self._base))
        self._must_prove = is_whole and self._base is self.module and not is_known

    def attach(self, recorder: Recorder) -> Callable[[], None]:
        """Install the hook and return the function that removes it.

        Collective for a wrapped module whose parameters are partitioned.
        """
        handles: list[Any] = []
        if self._adapter is not None and self._adapter is not self.module:
            handles += _seen_through(self._adapter, self.module, self.path)
        products: list[list[Product]] = []  # of the call that is being observed, the last one
        kept = None
        if self._gather is not None and self._base is not self.module and self._base.bias is not None:
            # A wrapper ends after its inner module did, which by then has given its parameters back.
            with self._gather([self._base.bias]) as (bias,):
                kept = bias.detach().clone()

        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if products and len(products[-1]) == 1:
                z_seen, _weight, y_seen = products[-1][0]
                self._record(recorder, z_seen, y_seen)
                return
            z = args[0] if args else next(iter(kwargs.values()))
            y = local(output[0] if isinstance(output, tuple) else output)
            bias = getattr(self._base, "bias", None) if kept is None else kept
            if bias is None:
                bias = getattr(self._base, "_bias", None)  # where transformers 5.12 keeps a row-parallel bias
            if bias is not None:
                y = y - local(bias)
            if self._must_prove:
                proven = self._prove(local(z), y, is_first_of_several=isinstance(output, tuple))
                if proven is None:
                    recorder.record_unreadable(self)
                    return
                y = proven
            self._record(recorder, z, y)

        if is_away(self.module):
            return while_there(self.module, after=observe)
        # Before DeepSpeed's own post-forward hook, which releases the parameters (and with them the bias) at stage 3.
        prepend = not self._observe_last
        handles.append(self.module.register_forward_hook(observe, prepend=prepend, with_kwargs=True))
        if self._must_prove and is_computed(self.module):
            shape = (sum(one.out_features for one in self.projections), self.projections[0].in_features)
            handles += note_products(self.module, shape, products)

        def detach() -> None:
            for handle in handles:
                handle.remove()

        return detach

    def _record(self, recorder: Recorder, z: Tensor, y: Tensor) -> None:
        recorder.record(
            self,
            recorder.sq_norm(local(z)),
            [local_sq_norm(block.take(y)) for block in self.blocks],
            in_part=self._in_part,
            out_part=self._out_part,
            leading_shape=z.shape[:-1],
        )

    def _prove(self, z: Tensor, y: Tensor, *, is_first_of_several: bool) -> Tensor | None:
        """Return W z, (..., O): y, once it is shown to be that, or the product of a router, which returns scores.

        The weight is whole while its module's forward runs, under ZeRO-3 and FSDP too. None where the module takes
        other shapes: DeepSeek-V4's grouped linear multiplies each part of z by a part of W. Raises ModelError for any
        other module whose output is not W z.
        """
        if z.shape[-1] != self.projections[0].in_features:
            return None
        weight = find_weight(Stored(self._base, path=self.path))
        product = nn.functional.linear(z, weight.dense().to(z.dtype))
        if y.shape != product.shape and not is_first_of_several:
            return None
        if not product.isfinite().all():
            return y
        if _is_near(y, product, max(_ROUNDING, weight.rounding)):
            self._must_prove = False
            return y
        if is_first_of_several or _ROUTER.search(type(self._base).__name__):
            return product
        raise ModelError(
            f"Module '{self.path}' ({type(self._base).__name__}) returns something else than its weight times its "
            "input, so that it has no norms to compare; load the model without what replaced its linears."
        )

    @contextmanager
    def weights(self) -> Iterator[Iterator[LocalWeight]]:
        """Give access to one LocalWeight per projection. Collective where parameters are partitioned."""
        if self._gather is None:
            _make_anew(self._base)
        with self._gather([self._base.weight]) if self._gather else nullcontext([None]) as (whole,):
            weight = find_weight(Stored(self._base, whole=whole, path=self.path))
            yield (
                LocalWeight(block.projection, block.take_weight(weight), self._is_sharded, self._in_index)
                for block in self.blocks
            )


def _make_anew(module: Any) -> None:
    """Have a weight made that hooks make of other parameters before each forward pass (pruning, old weight_norm).

    Until then it is that of the pass before, whatever has been loaded or learnt since.
    """
    if "weight" in vars(module) and module._forward_pre_hooks:
        with torch.no_grad():
            module(module.weight.new_zeros(1, module.in_features))


def _seen_through(adapter: nn.Module, module: nn.Module, path: str) -> list[Any]:
    """Install hooks that raise ModelError for an adapter that has returned without a call of the module it wraps.

    Such a one (PEFT's HRA, SHiRA, FROD) multiplies by weights of its own, and the module would have no score.
    """
    is_called = False

    def begin(*_: Any) -> None:
        nonlocal is_called
        is_called = False

    def note(*_: Any) -> None:
        nonlocal is_called
        is_called = True

    def end(*_: Any) -> None:
        if not is_called:
            kind = type(adapter)
            raise ModelError(
                f"Module '{path}' is wrapped by {kind.__module__}.{kind.__name__}, which multiplies by another weight "
                "instead of calling it, so that it has no norms; score the model before it is wrapped, or inside "
                "model.disable_adapter()."
            )

    return [
        adapter.register_forward_pre_hook(begin),
        module.register_forward_pre_hook(note),
        adapter.register_forward_hook(end),
    ]


def wrapped(module: Any) -> Any:
    """Return the linear inside an adapter's wrapper, PEFT's, Megatron-Bridge's or ours, or the module itself."""
    return getattr(module, "base_layer", None) or getattr(module, "to_wrap", None) or module


def _is_near(y: Tensor, expected: Tensor, most: float) -> bool:
    if y.shape != expected.shape:
        return False
    return bool((y.float() - expected.float()).norm() <= most * expected.float().norm())
