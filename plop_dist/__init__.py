"""Exact Normalized Feature Norms of sharded models, and LoRA placement from them (PLoP, arXiv 2506.20629).

Inside a job that already runs, whatever shards its model:

    import plop_dist

    scores = plop_dist.score(model, batches)              # collective: every rank calls it
    placement = plop_dist.place(scores, k=3)              # the three types with the lowest NFN
    model = placement.apply(model, r=16, lora_alpha=32)   # or placement.to_peft(...), to_megatron(), to_deepspeed()
    plop_dist.save_adapter(model, "adapter")              # after training: PEFT's files

With transformers' Trainer or TRL's: plop_dist.attach(trainer, k=3, r=16) before trainer.train(). Lightning has
lightning_callback, accelerate adapt_for_accelerate, Megatron-Bridge's recipes MegatronBridgePeft.

Without a job there is the command line, `plop-dist --help`. Importing this package imports no framework: not torch,
Ray, DeepSpeed, Megatron or PEFT.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plop_dist.choose.place import place as place
    from plop_dist.plugin.attach import attach as attach
    from plop_dist.plugin.before_wrapping import adapt_for_accelerate as adapt_for_accelerate
    from plop_dist.plugin.before_wrapping import lightning_callback as lightning_callback
    from plop_dist.plugin.bridge_peft import MegatronBridgePeft as MegatronBridgePeft
    from plop_dist.plugin.save import save_adapter as save_adapter
    from plop_dist.plugin.score import score as score
    from plop_dist.values.placement import Placement as Placement
    from plop_dist.values.scores import Scores as Scores

__version__ = "0.1.0"
# Without MegatronBridgePeft, which needs Megatron-Bridge to be there at all.
__all__ = [
    "Placement", "Scores", "__version__", "adapt_for_accelerate", "attach", "lightning_callback", "place",
    "save_adapter", "score",
]  # fmt: skip

_HOME = {
    "score": "plop_dist.plugin.score",
    "place": "plop_dist.choose.place",
    "attach": "plop_dist.plugin.attach",
    "adapt_for_accelerate": "plop_dist.plugin.before_wrapping",
    "lightning_callback": "plop_dist.plugin.before_wrapping",
    "MegatronBridgePeft": "plop_dist.plugin.bridge_peft",
    "save_adapter": "plop_dist.plugin.save",
    "Placement": "plop_dist.values.placement",
    "Scores": "plop_dist.values.scores",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'plop_dist' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
