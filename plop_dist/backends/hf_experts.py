"""How the experts that transformers keeps as 3-D parameters are observed, one by one, under logical names.

There is no module to hook: an experts module holds `gate_up_proj` (or `up_proj`) and `down_proj` of all experts and
runs the function registered for `config._experts_implementation`. While a site is attached, that function is ours: the
eager per-expert loop, which also notes the squared norms of what each routed token brings in and takes out. The routing
weight multiplies after down_proj and is no part of a gain.
"""

# T tokens, I in_features, O out_features, E experts, K experts per token

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from plop_dist.backends.hf_modules import Block, Rows, is_plain, parameter_shape
from plop_dist.errors import LayoutError, ModelError
from plop_dist.names import layer_index, module_type
from plop_dist.norms import local_sq_norm
from plop_dist.protocols import LocalWeight, Recorder
from plop_dist.types import Projection

IMPLEMENTATION = "plop_dist_observed"
_LOCKED = "deepgemm_megamoe"

log = logging.getLogger(__name__)

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


class ExpertSite:
    """One expert's projections that read the same z: gate and up (or up alone), or down."""

    group = "tp"

    def __init__(self, holder: _Holder, expert: int, parameter: str, blocks: tuple[Block, ...], gather: Gather | None):
        self.projections = tuple(block.projection for block in blocks)
        self.blocks = blocks
        self._holder, self._expert, self._parameter, self._gather = holder, expert, parameter, gather

    def attach(self, recorder: Recorder) -> Callable[[], None]:
        """Let the experts module run our implementation, and return the function that undoes it.

        The model's own implementation is back once the last of its sites is detached.
        """
        return self._holder.observe((self._expert, self._parameter), self, recorder)

    @contextmanager
    def weights(self) -> Iterator[Iterator[LocalWeight]]:
        """Give access to one LocalWeight per projection. Collective where parameters are partitioned (ZeRO-3, FSDP)."""
        parameter = getattr(self._holder.module, self._parameter)
        with _gathered(parameter, self._gather):
            whole = parameter.detach()
            weight = (whole.full_tensor() if isinstance(whole, DTensor) else whole)[self._expert]
            weight_OI = weight.T if self._holder.is_transposed else weight
            yield (LocalWeight(block.projection, block.take_rows(weight_OI)) for block in self.blocks)


def find_expert_sites(model: nn.Module, gather: Gather | None = None) -> list[ExpertSite]:
    """Return the sites of every routed expert kept in 3-D parameters: two per expert, in order of layer and expert.

    gather: gives whole parameters where they are partitioned; ZeRO-3's are recognised without it.
    Raises ModelError for quantised experts, LayoutError for experts sharded by transformers' tensor parallelism (their
    down_proj is reduced over the ranks only after all experts are mixed, so no expert's own output is ever whole).
    """
    sites: list[ExpertSite] = []
    for path, module in model.named_modules():
        if not _is_registered(module):
            _warn_unknown(path, module)
            continue
        _refuse(path, module)
        holder = _Holder(module)
        first = "gate_up_proj" if holder.has_gate else "up_proj"
        for expert in range(parameter_shape(module.down_proj)[0]):
            for name in (first, "down_proj"):
                sites.append(ExpertSite(holder, expert, name, _blocks(path, holder, expert, name), gather))
    return sites


@dataclass(frozen=True)
class _Observer:
    site: ExpertSite
    recorder: Recorder

    def note(self, in_sq_T: Tensor, y_TO: Tensor, token_index_T: Tensor) -> None:
        """Record one call: y_TO is W z without bias, (T, O) with all the blocks of the site."""
        out_sq_T = [local_sq_norm(block.take(y_TO)) for block in self.site.blocks]
        self.recorder.record(self.site, in_sq_T, out_sq_T, token_index_T=token_index_T)


class _Holder:
    """An experts module, who observes it, and how its parameters are laid out."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.has_gate: bool = module.has_gate
        self.is_transposed: bool = module.is_transposed
        self._observers: dict[tuple[int, str], _Observer] = {}

    def observe(self, key: tuple[int, str], site: ExpertSite, recorder: Recorder) -> Callable[[], None]:
        if key in self._observers:
            raise RuntimeError(f"'{site.projections[0].fqn}' is already being observed")
        if not self._observers:
            _OBSERVED[id(self.module)] = self._observers
            _switch(self.module.config)
        self._observers[key] = _Observer(site, recorder)

        def detach() -> None:
            if self._observers.pop(key, None) is not None and not self._observers:
                del _OBSERVED[id(self.module)]
                _switch_back(self.module.config)

        return detach


# The registered function receives the module alone, and layers share one config: hence the two tables, empty whenever
# no site is attached.
_OBSERVED: dict[int, dict[tuple[int, str], _Observer]] = {}
_SWITCHED: dict[int, tuple[int, str | None]] = {}


def _switch(config: Any) -> None:
    num_modules, own = _SWITCHED.get(id(config), (0, config._experts_implementation))
    _SWITCHED[id(config)] = (num_modules + 1, own)
    # The internal attribute, as transformers does itself: the property would overwrite sub-configurations too.
    config._experts_implementation_internal = IMPLEMENTATION


def _switch_back(config: Any) -> None:
    num_modules, own = _SWITCHED.pop(id(config))
    if num_modules > 1:
        _SWITCHED[id(config)] = (num_modules - 1, own)
    else:
        config._experts_implementation_internal = own


def _observed_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return what the eager implementation returns, bit for bit, and note every expert's squared norms on the way.

    hidden_states: (T, I); top_k_index, top_k_weights: (T, K). A token that picks one expert twice is noted once.
    """
    observers = _OBSERVED.get(id(self), {})
    first = "gate_up_proj" if self.has_gate else "up_proj"
    in_sq_T = local_sq_norm(hidden_states)
    mixed_TI = torch.zeros_like(hidden_states)
    # (E, K, T): the eager order of (k, token) pairs, so that every product sees the same rows.
    picks_EKT = nn.functional.one_hot(top_k_index, num_classes=self.num_experts).permute(2, 1, 0)
    repeats_TK = (top_k_index[:, :, None] == top_k_index[:, None, :]).tril(-1).any(-1)
    has_repeats = bool(repeats_TK.any())
    for expert in picks_EKT.sum(dim=(1, 2)).nonzero().flatten().tolist():
        pick_T, token_T = torch.where(picks_EKT[expert])
        kept_T = ~repeats_TK[token_T, pick_T] if has_repeats else slice(None)
        y_TO = _product(self, first, expert, hidden_states[token_T])
        if (expert, first) in observers:
            observers[expert, first].note(in_sq_T[token_T][kept_T], y_TO[kept_T], token_T[kept_T])
        y_TO = _with_bias(self, first, expert, y_TO)
        z_TI = self._apply_gate(y_TO) if self.has_gate else self.act_fn(y_TO)
        y_TO = _product(self, "down_proj", expert, z_TI)
        if (expert, "down_proj") in observers:
            observers[expert, "down_proj"].note(local_sq_norm(z_TI)[kept_T], y_TO[kept_T], token_T[kept_T])
        y_TO = _with_bias(self, "down_proj", expert, y_TO) * top_k_weights[token_T, pick_T, None]
        mixed_TI.index_add_(0, token_T, y_TO.to(mixed_TI.dtype))
    return mixed_TI


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _observed_forward)


def _product(module: Any, parameter: str, expert: int, z_TI: Tensor) -> Tensor:
    weight = getattr(module, parameter)[expert]
    return z_TI @ weight if module.is_transposed else nn.functional.linear(z_TI, weight)


def _with_bias(module: Any, parameter: str, expert: int, y_TO: Tensor) -> Tensor:
    return y_TO + getattr(module, f"{parameter}_bias")[expert] if module.has_bias else y_TO


def _blocks(path: str, holder: _Holder, expert: int, parameter: str) -> tuple[Block, ...]:
    _, *sizes = parameter_shape(getattr(holder.module, parameter))
    num_rows, num_columns = reversed(sizes) if holder.is_transposed else sizes
    if parameter != "gate_up_proj":
        return (Block(_projection(path, expert, parameter, parameter, num_columns, num_rows)),)
    half = num_rows // 2
    rows = (Rows(num_rows, 0, half), Rows(num_rows, half, num_rows))
    if not holder.module.is_concatenated:
        rows = (Rows(2, 0, 1), Rows(2, 1, 2))
    return tuple(
        Block(_projection(path, expert, name, parameter, num_columns, half), own)
        for name, own in zip(("gate_proj", "up_proj"), rows, strict=True)
    )


def _projection(path: str, expert: int, name: str, parameter: str, in_features: int, out_features: int) -> Projection:
    fqn = f"{path}.{expert}.{name}"
    return Projection(
        fqn=fqn,
        type=module_type(fqn),
        layer=layer_index(fqn),
        in_features=in_features,
        out_features=out_features,
        storage="expert_parameter",
        stored_in=f"{path}.{parameter}",
    )


def _gathered(parameter: nn.Parameter, gather: Gather | None) -> AbstractContextManager[Any]:
    if gather is not None:
        return gather([parameter])
    if hasattr(parameter, "ds_id"):
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter])
    return nullcontext()


def _is_registered(module: nn.Module) -> bool:
    """Tell whether a module is an experts class that dispatches through the registered implementations."""
    return all(
        hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated", "down_proj")
    )


def _refuse(path: str, module: Any) -> None:
    if not is_plain(module.down_proj):
        raise ModelError(
            f"Experts '{path}' hold quantised weights ({module.down_proj.dtype}), whose norms cannot be read; load the "
            "model in float32, bfloat16 or float16, without a quantization_config."
        )
    if module.config._experts_implementation == _LOCKED:
        raise ModelError(
            f"Experts '{path}' run the implementation '{_LOCKED}', which is fixed when a model is loaded and shows no "
            "expert's output; load the model with experts_implementation='grouped_mm'."
        )
    if getattr(module, "_hf_tp_plan", None):
        raise LayoutError(
            f"Experts '{path}' are sharded by transformers' tensor parallelism ({module._hf_tp_plan}), where no "
            "expert's output is whole on any rank; use parallel.tp=1, or backend megatron with parallel.ep."
        )


def _warn_unknown(path: str, module: nn.Module) -> None:
    """Say which 3-D parameters nothing can be read from: experts classes outside the registered implementations."""
    for name, parameter in module.named_parameters(recurse=False):
        is_convolution = isinstance(module, nn.modules.conv._ConvNd)
        if (
            len(parameter_shape(parameter)) == 3
            and not is_convolution
            and "expert" in f"{path} {type(module).__name__}".lower()
        ):
            log.warning(
                "'%s.%s' (%s) is not scored: it runs no registered experts implementation.",
                path,
                name,
                type(module).__name__,
            )
