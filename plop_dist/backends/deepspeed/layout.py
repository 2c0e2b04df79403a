"""Whether AutoTP or a pipeline divides a model, from its configuration alone."""

from __future__ import annotations

from typing import Any

from plop_dist.backends.deepspeed.stack import check_stack
from plop_dist.backends.hf.own_class import architecture
from plop_dist.errors import LayoutError
from plop_dist.values.mesh import nearest


def check_tp(hf_config: Any, tp: int) -> None:
    """Raise LayoutError where a rank would be left without attention heads.

    AutoTP shares heads out unevenly, so that any size up to their number fits.
    """
    heads = getattr(hf_config.get_text_config(), "num_key_value_heads", None)
    if heads and tp > heads:
        fitting = nearest(tp, range(1, heads + 1))[0]
        raise LayoutError(
            f"parallel.tp is {tp}, but {architecture(hf_config)} has {heads} num_key_value_heads, so that a rank would "
            f"have no attention heads; use parallel.tp={fitting}."
        )


def check_pp(hf_config: Any, pp: int) -> None:
    """Raise LayoutError where a stage would be left without layers, ModelError for what is no plain stack of them."""
    check_stack(hf_config, architecture(hf_config))
    num_layers = hf_config.num_hidden_layers
    if pp > num_layers:
        fitting = nearest(pp, range(1, num_layers + 1))[0]
        raise LayoutError(
            f"parallel.pp is {pp}, but {architecture(hf_config)} has {num_layers} decoder layers; use "
            f"parallel.pp={fitting}."
        )
