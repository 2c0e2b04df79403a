"""A module that keeps the matrices of all its experts in 3-D parameters: what is in them, and who observes which.

How each kind of such a module is observed stands in expert_kinds and registered_experts.
"""

# T tokens, I in_features, O out_features, E experts

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from plop_dist.measure.weight import Stored

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

    def stored(self, stack: Stack, expert: int, whole: Tensor | None = None) -> Stored:
        """Return where one expert's matrix lies. whole: the stack's values where they had to be gathered."""
        path = f"{self.holder_path}.{stack.parameter}"
        return Stored(self.module, stack.parameter, expert, stack.is_transposed, whole, path)

    @property
    def is_sharded(self) -> bool:
        """Whether transformers' tensor parallelism has cut the matrices, so that no product here is whole."""
        return getattr(self.module, "_hf_tp_plan", None) is not None

    def _begin(self) -> Callable[[], None]:
        """Let the module call self._notes from now on; returns what ends that."""
        raise NotImplementedError
