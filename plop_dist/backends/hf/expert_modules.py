"""The ways in which transformers' models run experts that they keep as 3-D parameters, and how each is observed.

Most experts modules run the function registered for `config._experts_implementation`: while one is observed, that
function is ours, the eager per-expert loop, which also notes the squared norms. GraniteMoE and JetMoE multiply tokens
sorted by expert, one stack of matrices per module: forward hooks see all of it. Llama 4 gives every expert a row for
every token, zero where it was not chosen, and LongCat has its own loop: the chosen tokens' products are done twice.
"""

# T tokens, N (token, expert) pairs, I in_features, O out_features, E experts, K experts per token

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from plop_dist.backends.hf.linears import parameter_shape
from plop_dist.measure.norms import local_sq_norm

IMPLEMENTATION = "plop_dist_observed"

# Called with ||z||^2 (T,), W z without bias (T, O), and each row's index among the micro-batch's flattened tokens (T,).
Note = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Stack:
    """A 3-D parameter: the matrices of all experts.

    names: the logical projections that share its output features, halves of them where there are two: one after the
    other, or (is_interleaved) in turn. is_transposed: (E, I, O) instead of (E, O, I).
    """

    parameter: str
    names: tuple[str, ...]
    is_transposed: bool = False
    is_interleaved: bool = False


class ExpertsModule:
    """A module that holds `stacks`. path: the logical path that precedes the experts' numbers, ending in `experts`."""

    def __init__(self, path: str, holder_path: str, module: nn.Module, stacks: tuple[Stack, ...]) -> None:
        self.path, self.holder_path, self.module, self.stacks = path, holder_path, module, stacks
        self._notes: dict[tuple[int, str], Note] = {}
        self._end: Callable[[], None] = lambda: None

    def observe(self, expert: int, stack: Stack, note: Note) -> Callable[[], None]:
        """Call `note` for every forward pass of one expert's matrix, and return the function that ends it.

        The module is as it was once the last of its matrices is no longer observed.
        """
        key = (expert, stack.parameter)
        if key in self._notes:
            raise RuntimeError(f"'{self.path}.{expert}.{stack.names[0]}' is already being observed")
        if not self._notes:
            self._end = self._begin()
        self._notes[key] = note

        def stop() -> None:
            if self._notes.pop(key, None) is not None and not self._notes:
                self._end()

        return stop

    @property
    def is_sharded(self) -> bool:
        """Whether transformers' tensor parallelism has cut the matrices, so that no product here is whole."""
        return getattr(self.module, "_hf_tp_plan", None) is not None

    def _begin(self) -> Callable[[], None]:
        """Let the module call self._notes from now on; returns what ends that."""
        raise NotImplementedError


def experts_module(path: str, module: Any, modules: Mapping[str, nn.Module]) -> ExpertsModule | None:
    """Return how a module's experts are observed, or None for a module that is not of a known kind.

    modules: all of the model's, by path.
    """
    if _is_registered(module):
        return _Registered(path, module)
    owner_path, _, name = path.rpartition(".")
    owner, kind = modules.get(owner_path), type(module).__name__
    if kind in _PARALLEL:
        names = _PARALLEL_NAMES["attention" if type(owner).__name__.endswith("MoA") else "mlp"].get(name)
        if names and hasattr(owner, "router"):
            experts_path = owner_path if owner_path.endswith(".experts") else f"{owner_path}.experts"
            return _Sorted(experts_path, path, module, owner.router, Stack("weight", names))
    if kind == "LongcatFlashExperts" and module.down_proj is not None:
        return _Indexed(path, module)
    return _Batched(path, module) if kind == "Llama4TextExperts" else None


def _is_registered(module: nn.Module) -> bool:
    """Tell whether a module is an experts class that dispatches through the registered implementations."""
    return all(
        hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated", "down_proj")
    )


class _Registered(ExpertsModule):
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


_PARALLEL_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "mlp": {"input_linear": ("gate_proj", "up_proj"), "output_linear": ("down_proj",)},
    "attention": {"input_linear": ("q_proj",), "output_linear": ("o_proj",)},  # JetMoE's mixture of attention
}
_PARALLEL = (
    "GraniteMoeParallelExperts",
    "GraniteMoeHybridParallelExperts",
    "GraniteMoeSharedParallelExperts",
    "JetMoeParallelExperts",
)


class _Sorted(ExpertsModule):
    """GraniteMoE's and JetMoE's ParallelExperts(z_NI, sizes): the rows of one expert after those of another."""

    def __init__(self, path: str, holder_path: str, module: nn.Module, router: nn.Module, stack: Stack) -> None:
        super().__init__(path, holder_path, module, (stack,))
        self._router = router

    def _begin(self) -> Callable[[], None]:
        token_N: Tensor | None = None

        def route(_module: Any, _args: Any, output: tuple[Any, ...]) -> None:
            nonlocal token_N
            token_N = output[1]  # (order of the pairs, token of each sorted pair, gates, sizes, logits)

        def note(_module: Any, args: tuple[Tensor, list[int]], y_NO: Tensor) -> None:
            z_NI, sizes_E = args
            assert token_N is not None
            parts = zip(local_sq_norm(z_NI).split(sizes_E), y_NO.split(sizes_E), token_N.split(sizes_E), strict=True)
            for expert, (in_sq_T, y_TO, token_T) in enumerate(parts):
                if len(token_T) and (expert, "weight") in self._notes:
                    self._notes[expert, "weight"](in_sq_T, y_TO, token_T)

        handles = (self._router.register_forward_hook(route), self.module.register_forward_hook(note))

        def end() -> None:
            for handle in handles:
                handle.remove()

        return end


class _Repeated(ExpertsModule):
    """Experts whose products nobody sees: those of the chosen tokens are done once more, before the module runs.

    Afterwards ZeRO-3 and FSDP have given its parameters back.
    """

    def _begin(self) -> Callable[[], None]:
        return self.module.register_forward_pre_hook(self._note).remove

    def _inputs(self, expert: int, args: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return what this expert is given, (T, I), and which of the micro-batch's tokens that are, (T,)."""
        raise NotImplementedError

    @torch.no_grad()
    def _note(self, module: Any, args: tuple[Tensor, ...]) -> None:
        first, down = self.stacks
        for expert in sorted({expert for expert, _ in self._notes}):
            z_TI, token_T = self._inputs(expert, args)
            if not len(token_T):
                continue
            y_TO = self._product(first, expert, z_TI)
            if (expert, first.parameter) in self._notes:
                self._notes[expert, first.parameter](local_sq_norm(z_TI), y_TO, token_T)
            if (expert, down.parameter) in self._notes:
                gate_TO, up_TO = y_TO.chunk(2, dim=-1)
                z_TI = module.act_fn(gate_TO) * up_TO
                self._notes[expert, down.parameter](local_sq_norm(z_TI), self._product(down, expert, z_TI), token_T)

    def _product(self, stack: Stack, expert: int, z_TI: Tensor) -> Tensor:
        weight = getattr(self.module, stack.parameter)[expert]
        return z_TI @ (weight if stack.is_transposed else weight.T)


class _Batched(_Repeated):
    """Llama 4's experts: (E T, I) in, every token once per expert, times its routing score, which is 0 for most."""

    def __init__(self, path: str, module: Any) -> None:
        stacks = (Stack("gate_up_proj", ("gate_proj", "up_proj"), True), Stack("down_proj", ("down_proj",), True))
        super().__init__(path, path, module, stacks)

    @property
    def is_sharded(self) -> bool:
        """Told by the sizes: transformers' plan for Llama 4 cuts the parameters, and leaves no mark on the module."""
        module: Any = self.module
        sizes = (module.num_experts, module.expert_dim, module.hidden_size)
        return parameter_shape(module.down_proj) != sizes

    def _inputs(self, expert: int, args: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        module: Any = self.module
        z_TI = args[0].view(module.num_experts, -1, module.hidden_size)[expert]
        token_T = z_TI.any(dim=-1).nonzero().flatten()
        return z_TI[token_T], token_T


class _Indexed(_Repeated):
    """LongCat's experts(hidden_states, top_k_index, top_k_weights), of which the last ones only hand tokens on.

    gate_up_proj has matrices for those too, unused: projections without tokens, to which PEFT's adapter has rows.
    """

    def __init__(self, path: str, module: Any) -> None:
        stacks = (Stack("gate_up_proj", ("gate_proj", "up_proj")), Stack("down_proj", ("down_proj",)))
        super().__init__(path, path, module, stacks)

    def _inputs(self, expert: int, args: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        hidden_TI, top_k_index_TK = args[:2]
        is_chosen_T = (top_k_index_TK == expert).any(dim=-1) & (expert < parameter_shape(self.module.down_proj)[0])
        token_T = is_chosen_T.nonzero().flatten()
        return hidden_TI[token_T], token_T
