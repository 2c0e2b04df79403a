"""Experts that run the function registered for `config._experts_implementation`, and how they are observed.

While one is, that function is ours: the eager per-expert loop, which also notes the squared norms.
"""

# T tokens, I in_features, O out_features, E experts, K experts per token

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from plop_dist.backends.hf.expert_modules import ExpertsModule, Note, Stack
from plop_dist.measure.norms import local_sq_norm

IMPLEMENTATION = "plop_dist_observed"


def is_registered(module: nn.Module) -> bool:
    """Tell whether a module is an experts class that dispatches through the registered implementations."""
    return all(
        hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated", "down_proj")
    )


class RegisteredExperts(ExpertsModule):
    """Experts that run a registered function."""

    def __init__(self, path: str, module: Any) -> None:
        turned, in_turn = module.is_transposed, not module.is_concatenated
        first = ("gate_up_proj", ("gate_proj", "up_proj")) if module.has_gate else ("up_proj", ("up_proj",))
        stacks = (Stack(*first, turned, in_turn), Stack("down_proj", ("down_proj",), turned))
        super().__init__(path, path, module, stacks)

    def _begin(self) -> Callable[[], None]:
        module: Any = self.module
        _OBSERVED[id(module)] = self._notes
        _switch(module.config)

        def end() -> None:
            del _OBSERVED[id(module)]
            _switch_back(module.config)

        return end


# The registered function receives the module alone, and layers share one config: hence the two tables, empty whenever
# nothing is observed.
_OBSERVED: dict[int, dict[tuple[int, str], Note]] = {}
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

    hidden_states: (T, I); top_k_index, top_k_weights: (T, K). A token that picks one expert twice is noted once. The
    routing weight multiplies after down_proj and is no part of a gain.
    """
    notes = _OBSERVED.get(id(self), {})
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
        if (expert, first) in notes:
            notes[expert, first](in_sq_T[token_T][kept_T], y_TO[kept_T], token_T[kept_T])
        y_TO = _with_bias(self, first, expert, y_TO)
        z_TI = self._apply_gate(y_TO) if self.has_gate else self.act_fn(y_TO)
        y_TO = _product(self, "down_proj", expert, z_TI)
        if (expert, "down_proj") in notes:
            notes[expert, "down_proj"](local_sq_norm(z_TI)[kept_T], y_TO[kept_T], token_T[kept_T])
        y_TO = _with_bias(self, "down_proj", expert, y_TO) * top_k_weights[token_T, pick_T, None]
        mixed_TI.index_add_(0, token_T, y_TO.to(mixed_TI.dtype))
    return mixed_TI


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _observed_forward)


def _product(module: Any, parameter: str, expert: int, z_TI: Tensor) -> Tensor:
    weight = getattr(module, parameter)[expert]
    return z_TI @ weight if module.is_transposed else nn.functional.linear(z_TI, weight)


def _with_bias(module: Any, parameter: str, expert: int, y_TO: Tensor) -> Tensor:
    return y_TO + getattr(module, f"{parameter}_bias")[expert] if module.has_bias else y_TO
