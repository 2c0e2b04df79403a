"""Whether transformers' tensor parallelism divides a model, from its configuration alone."""

from __future__ import annotations

from typing import Any

from plop_dist.backends.hf.own_class import architecture
from plop_dist.config.schema import Config
from plop_dist.errors import LayoutError
from plop_dist.values.mesh import divisors, nearest

_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")


def check_tp(hf_config: Any, tp: int) -> None:
    """Raise LayoutError where the model has no tensor-parallel plan or its heads do not divide."""
    name, text = architecture(hf_config), hf_config.get_text_config()
    if not getattr(text, "base_model_tp_plan", None):
        raise LayoutError(
            f"parallel.tp is {tp}, but transformers has no tensor-parallel plan for {name}; use parallel.dp, or "
            "parallel.backend=deepspeed."
        )
    for field in ("num_key_value_heads", "num_attention_heads"):
        heads = getattr(text, field, None)
        if heads and heads % tp:
            fitting = " or ".join(map(str, nearest(tp, divisors(heads))))
            raise LayoutError(
                f"parallel.tp is {tp}, which does not divide the {heads} {field} of {name}; use parallel.tp={fitting}."
            )


def refuse_experts(hf_config: Any, config: Config) -> None:
    """Raise LayoutError for routed experts where tensor parallelism would cut each of them."""
    if num_experts(hf_config):
        raise LayoutError(
            f"parallel.tp is {config.parallel.tp} with parallel.backend '{config.parallel.backend}', which shards the "
            "inside of each expert, so that no expert's output is whole on any rank; use parallel.tp=1, or "
            "parallel.backend=megatron with parallel.ep."
        )


def num_experts(hf_config: Any) -> int:
    """Return how many routed experts each layer has, 0 for a dense model."""
    text = hf_config.get_text_config()
    return next((getattr(text, name) for name in _EXPERT_FIELDS if getattr(text, name, None)), 0)
