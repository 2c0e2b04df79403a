"""Exact Normalized Feature Norms of sharded models, and LoRA placement from them (PLoP, arXiv 2506.20629).

Inside a job that already runs, whatever shards its model:

    import plop_dist

    scores = plop_dist.score(model, batches)              # collective: every rank calls it
    placement = plop_dist.place(scores, k=3)              # the three types with the lowest NFN
    peft_config = placement.to_peft(r=16, lora_alpha=32)  # likewise to_megatron(), to_deepspeed()

Without a job there is the command line, `plop-dist --help`. Importing this package imports no framework: not torch,
Ray, DeepSpeed, Megatron or PEFT.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plop_dist.choose.place import place as place
    from plop_dist.plugin.score import score as score
    from plop_dist.values.placement import Placement as Placement
    from plop_dist.values.scores import Scores as Scores

__version__ = "0.1.0"
__all__ = ["Placement", "Scores", "__version__", "place", "score"]

_HOME = {
    "score": "plop_dist.plugin.score",
    "place": "plop_dist.choose.place",
    "Placement": "plop_dist.values.placement",
    "Scores": "plop_dist.values.scores",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'plop_dist' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
