"""cfg.peft of Megatron-Bridge's recipes: scores, places and adapts the chunks before Bridge wraps them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from plop_dist.choose.place import place as place_scores
from plop_dist.errors import ConfigError
from plop_dist.plugin.apply import apply
from plop_dist.plugin.score import score
from plop_dist.registry import import_package
from plop_dist.training.adapters.on_megatron import bridge_adapters
from plop_dist.values.placement import Placement

import_package("megatron.bridge")

from megatron.bridge.peft.base import PEFT  # noqa: E402  # after the stub that stands in for Transformer Engine

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


@dataclass
class MegatronBridgePeft(PEFT):
    """What Bridge calls with its chunks, base weights loaded, before DDP: cfg.peft = MegatronBridgePeft(batches=...).

    batches: what plop_dist.score reads, this replica's share, or a function that gives it: a function where the
    process groups that deal the rows out exist only later; when a run goes on, they must be the same again. k,
    num_samples, place: as plop_dist.attach takes them. lora: options of placement.apply (r, lora_alpha, lora_dropout).
    Once called, `placement` is what it came to.
    """

    batches: Batches = ()
    k: int = 3
    num_samples: int | None = None
    place: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    placement: Placement | None = field(default=None, init=False, repr=False)

    def __call__(self, model: Any, training: bool = True) -> Any:
        """Return the chunks with adapters. Collective over the world. Raises what score, place and apply raise."""
        batches = self.batches() if callable(self.batches) else self.batches
        self.placement = place_scores(score(model, batches, num_samples=self.num_samples), k=self.k, **self.place)
        adapted = apply(self.placement, model, **self.lora)
        for chunk in adapted if isinstance(adapted, list) else [adapted]:
            chunk.train(training)
        return adapted

    def to_cfg_dict(self) -> dict[str, Any]:
        """Return what run_config.yaml holds: the plain adapters that it came to; checkpoints then need no batches."""
        if self.placement is None:
            return {"_target_": f"{__name__}.{type(self).__name__}", "k": self.k, "num_samples": self.num_samples}
        peft = bridge_adapters(self.placement, self.placement.to_peft(**self.lora))
        settings = {one.name: getattr(peft, one.name) for one in fields(peft) if one.init}
        return {"_target_": f"{type(peft).__module__}.{type(peft).__name__}", **settings}

    def transform(self, module: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """Raise ConfigError: which module is adapted is known only of the whole model."""
        raise ConfigError(
            f"MegatronBridgePeft adapts a whole model at once, not '{name}' by itself; call it with the list of chunks."
        )
