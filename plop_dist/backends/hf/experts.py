"""The experts that transformers keeps as 3-D parameters, one by one, under logical names; see expert_modules."""

# T tokens, I in_features, O out_features, E experts

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from plop_dist.backends.hf.expert_kinds import experts_module
from plop_dist.backends.hf.expert_modules import ExpertsModule, Stack
from plop_dist.backends.hf.linears import projection_of
from plop_dist.backends.hf.own_modules import named_modules, parameter_shape
from plop_dist.errors import LayoutError, ModelError
from plop_dist.measure.blocks import Block, Rows
from plop_dist.measure.norms import local_sq_norm
from plop_dist.measure.protocols import LocalWeight, Recorder
from plop_dist.measure.weight import Gather, Weight, find_weight, is_readable

_LOCKED = "deepgemm_megamoe"


class StackHolder:
    """The WeightHolder of one 3-D parameter: gathered once for all of its experts, where it is partitioned."""

    def __init__(self, experts: ExpertsModule, stack: Stack, gather: Gather | None) -> None:
        self._experts, self._stack, self._gather = experts, stack, gather
        self._whole: Tensor | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the parameter whole for the length of a block; inside another such block nothing is done."""
        if self._gather is None or self._whole is not None:
            yield
            return
        with self._gather([self._experts.module.get_parameter(self._stack.parameter)]) as (whole,):
            self._whole = whole.detach()
            try:
                yield
            finally:
                self._whole = None

    def weight(self, expert: int) -> Weight:
        """Return one expert's matrix, (O, I), inside of opened()."""
        return find_weight(self._experts.stored(self._stack, expert, self._whole))


class StackedExpertSite:
    """One expert's projections that read the same z, of a 3-D parameter: gate and up (or up alone), or down."""

    group = "tp"

    def __init__(self, experts: ExpertsModule, expert: int, stack: Stack, holder: StackHolder) -> None:
        self.blocks = _blocks(experts, expert, stack)
        self.projections = tuple(block.projection for block in self.blocks)
        self.holder, self.holding_module = holder, experts.module
        self._experts, self._expert, self._stack = experts, expert, stack

    def attach(self, recorder: Recorder) -> Callable[[], None]:
        """Observe the experts module, and return the function that undoes it with the last of its sites."""

        def note(in_sq_T: Tensor, y_TO: Tensor, token_index_T: Tensor) -> None:
            out_sq_T = [local_sq_norm(block.take(y_TO)) for block in self.blocks]
            recorder.record(self, in_sq_T, out_sq_T, token_index_T=token_index_T)

        return self._experts.observe(self._expert, self._stack, note)

    @contextmanager
    def weights(self) -> Iterator[Iterator[LocalWeight]]:
        """Give access to one LocalWeight per projection. Collective where parameters are partitioned (ZeRO-3, FSDP)."""
        with self.holder.opened():
            weight = self.holder.weight(self._expert)
            yield (LocalWeight(block.projection, block.take_weight(weight)) for block in self.blocks)


def find_expert_sites(model: nn.Module, gather: Gather | None = None) -> list[StackedExpertSite]:
    """Return the sites of every routed expert kept in 3-D parameters, one per expert and parameter.

    gather: gives whole parameters where they are partitioned (ZeRO-3, FSDP).
    Raises ModelError for quantised experts, LayoutError for experts sharded by transformers' tensor parallelism (their
    down_proj is reduced over the ranks only after all experts are mixed, so no expert's own output is ever whole).
    """
    sites: list[StackedExpertSite] = []
    modules = named_modules(model)
    for path, module in modules.items():
        experts = experts_module(path, module, modules)
        if experts is None:
            continue
        _refuse(path, module, experts)
        held = [(stack, StackHolder(experts, stack, gather), _shape(experts, stack)[0]) for stack in experts.stacks]
        sites.extend(
            StackedExpertSite(experts, expert, stack, holder)
            for expert in range(max(count for _, _, count in held))
            for stack, holder, count in held
            if expert < count  # LongCat's counts are not the same
        )
    return sites


def _shape(experts: ExpertsModule, stack: Stack) -> tuple[int, ...]:
    return parameter_shape(getattr(experts.module, stack.parameter))


def _blocks(experts: ExpertsModule, expert: int, stack: Stack) -> tuple[Block, ...]:
    _, *sizes = _shape(experts, stack)
    num_rows, num_columns = reversed(sizes) if stack.is_transposed else sizes
    width = num_rows // len(stack.names)
    if len(stack.names) == 1:
        all_rows: list[Rows | None] = [None]
    elif stack.is_interleaved:
        all_rows = [Rows(2, 0, 1), Rows(2, 1, 2)]
    else:
        all_rows = [Rows(num_rows, 0, width), Rows(num_rows, width, num_rows)]
    stored_in = f"{experts.holder_path}.{stack.parameter}"
    return tuple(
        Block(projection_of(f"{experts.path}.{expert}.{name}", num_columns, width, "expert_parameter", stored_in), rows)
        for name, rows in zip(stack.names, all_rows, strict=True)
    )


def _refuse(path: str, module: Any, experts: ExpertsModule) -> None:
    for stack in experts.stacks:
        if not is_readable(experts.stored(stack, 0)):
            dtype = getattr(getattr(module, stack.parameter), "dtype", None)
            raise ModelError(
                f"Experts '{path}' hold quantised weights ({dtype}), whose norms cannot be read; load the model in "
                "float32, bfloat16 or float16, without a quantization_config."
            )
    if getattr(getattr(module, "config", None), "_experts_implementation", None) == _LOCKED:
        raise ModelError(
            f"Experts '{path}' run the implementation '{_LOCKED}', which is fixed when a model is loaded and shows no "
            "expert's output; load the model with experts_implementation='grouped_mm'."
        )
    if experts.is_sharded:
        raise LayoutError(
            f"Experts '{path}' are sharded by transformers' tensor parallelism, where no expert's output is whole on "
            "any rank; use parallel.tp=1, or backend megatron with parallel.ep."
        )
