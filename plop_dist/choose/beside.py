"""What the choice costs in training beside adapters on the MLP and on everything: parameters and kept activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from plop_dist.choose.decision import Decision, decide_for
from plop_dist.choose.place import placement_with
from plop_dist.errors import PlacementError
from plop_dist.values.names import expert_index
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Projection, Scores

_OTHERS = ("mlp", "all")
_FLOAT_BYTES = 4  # adapters compute in float32, whatever the model does
# Projections that read the very same tensor.
_SHARED_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


@dataclass(frozen=True)
class Beside:
    """One choice. num_parameters: also the multiply-adds that a token's forward pass costs more.

    kept_bytes: activations per token that are kept for the adapters' gradients, None with routed experts, whose tokens
    are not known.
    """

    name: str
    num_modules: int
    rank: int
    num_parameters: int
    kept_bytes: int | None


def beside(decision: Decision, placement: Placement) -> tuple[Beside, ...]:
    """Return the placement itself, and what policies mlp and all would choose at its rank, or with placement.match."""
    scores, config = decision.scores, decision.config
    found = [_of("this placement", placement, scores)]
    for name in _OTHERS:
        update = {"policy": name, "granularity": "type", "options": {}, "rank": config.rank}
        if config.match is None:
            update |= {"rank": placement.rank, "alpha": placement.alpha}
        try:
            other = decide_for(scores, config.model_copy(update=update), decision.eligible)
            found.append(_of(name, placement_with(other, other.chosen_U), scores))
        except PlacementError:  # no such modules, or none that may be chosen
            continue
    return tuple(found)


def kept_bytes(modules: Iterable[Projection], rank_of: Callable[[Projection], int], *, is_float32: bool) -> int:
    """Return the bytes that LoRA keeps of every token until its gradients are computed: float32.

    A's gradient needs the module's input, B's what A makes of it. A frozen linear keeps neither. Of a float32 model
    q, k and v keep one input together, and so do gate and up; of another one each keeps a float32 copy of its own.
    """
    inputs: dict[object, int] = {}
    total = 0
    for module in modules:
        parent, _, name = module.fqn.rpartition(".")
        group = next((index for index, names in enumerate(_SHARED_INPUT) if name in names), None)
        key = (parent, group) if is_float32 and group is not None else module.fqn
        inputs[key] = module.in_features
        total += rank_of(module)
    return _FLOAT_BYTES * (total + sum(inputs.values()))


def _of(name: str, placement: Placement, scores: Scores) -> Beside:
    chosen = placement.chosen
    has_experts = any(expert_index(module.fqn) is not None for module in chosen)
    is_float32 = scores.model.dtype == "float32"
    kept = None if has_experts else kept_bytes(chosen, placement.rank_of, is_float32=is_float32)
    return Beside(name, len(chosen), placement.rank, placement.num_trainable_parameters, kept)
