"""Which kind of experts module a module is, and how those that run no registered function are observed.

GraniteMoE and JetMoE multiply tokens sorted by expert, one stack of matrices per module: forward hooks see all of it.
Llama 4 gives every expert a row for every token, zero where it was not chosen, and LongCat has its own loop: the chosen
tokens' products are done twice.
"""

# T tokens, N (token, expert) pairs, I in_features, O out_features, E experts, K experts per token

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plop_dist.backends.hf.expert_modules import ExpertsModule, Stack
from plop_dist.backends.hf.offload import is_away, while_there
from plop_dist.backends.hf.own_modules import parameter_shape
from plop_dist.backends.hf.registered_experts import RegisteredExperts, is_registered
from plop_dist.measure.norms import local_sq_norm
from plop_dist.measure.weight import find_weight


def experts_module(path: str, module: Any, modules: Mapping[str, nn.Module]) -> ExpertsModule | None:
    """Return how a module's experts are observed, or None for a module that is not of a known kind.

    modules: all of the model's, by path.
    """
    if is_registered(module):
        return RegisteredExperts(path, module)
    owner_path, _, name = path.rpartition(".")
    owner, kind = modules.get(owner_path), type(module).__name__
    router = getattr(owner, "router", None)
    if kind in _PARALLEL:
        names = _PARALLEL_NAMES["attention" if type(owner).__name__.endswith("MoA") else "mlp"].get(name)
        if names and isinstance(router, nn.Module):
            experts_path = owner_path if owner_path.endswith(".experts") else f"{owner_path}.experts"
            return _Sorted(experts_path, path, module, router, Stack("weight", names))
    if kind == "LongcatFlashExperts" and module.down_proj is not None:
        return _Indexed(path, module)
    return _Batched(path, module) if kind == "Llama4TextExperts" else None


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
        if is_away(self.module):
            return while_there(self.module, before=self._note)
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
        return z_TI @ find_weight(self.stored(stack, expert)).dense().T


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
