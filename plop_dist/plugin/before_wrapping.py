"""One call before a framework wraps the model, accelerate or Lightning: scored, placed, adapted."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from plop_dist.choose.place import place as place_scores
from plop_dist.errors import ConfigError, MissingExtraError, ModelError
from plop_dist.plugin.apply import apply
from plop_dist.plugin.score import score
from plop_dist.registry import import_package
from plop_dist.values.placement import Placement


def adapt_for_accelerate(
    accelerator: Any,
    model: nn.Module,
    batches: Iterable[Any],
    k: int = 3,
    *,
    num_samples: int = 128,
    place: Mapping[str, Any] | None = None,
    **lora: Any,
) -> nn.Module:
    """Return a model with the adapters of a new placement, for accelerator.prepare. Collective over the world.

    Called once the Accelerator is made and before the optimizer is, with the model and the loader that are not prepared
    yet. batches: the same on every rank, as a loader is before prepare; the ranks deal them out. k, num_samples,
    place, lora: as plop_dist.attach takes them. Raises what score, place and Placement.apply raise, and ModelError for
    a model that was prepared.
    """
    # What prepare returns is marked; what it was given is noted, and in one process often is the same.
    if getattr(model, "_is_accelerate_prepared", False) or any(model is prepared for prepared in accelerator._models):
        raise ModelError(
            "adapt_for_accelerate() got a model that accelerator.prepare has wrapped already; call it before prepare "
            "and before the optimizer is made, or give the prepared model to score, place and placement.apply."
        )
    shards = str(accelerator.distributed_type).rpartition(".")[2] in ("FSDP", "DEEPSPEED", "MEGATRON_LM")
    device = None if shards else accelerator.device
    return _adapted(model, batches, k, num_samples, place, lora, device)[0]


def lightning_callback(
    k: int = 3,
    *,
    num_samples: int = 128,
    batches: Iterable[Any] | None = None,
    attribute: str = "model",
    place: Mapping[str, Any] | None = None,
    **lora: Any,
) -> Any:
    """Return a callback of Lightning's Trainer that adapts a LightningModule's model before the strategy wraps it.

    attribute: where the LightningModule holds its transformers model, made in its __init__. batches: others than those
    of the trainer's loader, the same on every rank. k, num_samples, place, lora: as plop_dist.attach takes them. The
    callback's `placement` is what it came to. In fit it raises what score, place and Placement.apply raise, and
    ModelError for a LightningModule without that attribute.
    """

    def setup(self: Any, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        model = getattr(pl_module, attribute, None)
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"{type(pl_module).__name__} has no module '{attribute}' yet; make the model in __init__, and name it "
                "by attribute= of lightning_callback."
            )
        own = _loader(trainer, pl_module) if batches is None else batches
        strategy = type(trainer.strategy).__name__
        device = trainer.strategy.root_device if strategy in ("SingleDeviceStrategy", "DDPStrategy") else None
        adapted, self.placement = _adapted(model, own, k, num_samples, place, lora, device)
        setattr(pl_module, attribute, adapted)

    return type("PlopCallback", (_callback_class(),), {"setup": setup, "placement": None})()


def _callback_class() -> Any:
    """Return Callback of whichever of Lightning's two packages the script has imported."""
    loaded = [name for name in ("lightning.pytorch", "pytorch_lightning") if name in sys.modules]
    for name in loaded or ("lightning.pytorch", "pytorch_lightning"):
        try:
            return import_package(name).Callback
        except ModuleNotFoundError:
            continue
    raise MissingExtraError("lightning_callback() needs Lightning, which is not installed: pip install lightning")


def _loader(trainer: Any, pl_module: Any) -> Iterable[Any]:
    source = trainer.fit_loop._data_source
    loader = source.instance.train_dataloader() if source.is_module() else source.instance
    if not isinstance(loader, Iterable) or isinstance(loader, Mapping | list | tuple):
        raise ConfigError(
            f"lightning_callback() cannot score a {type(loader).__name__} of {type(pl_module).__name__}'s training; "
            "give it batches= of dictionaries with input_ids and attention_mask."
        )
    return loader


def _adapted(
    model: nn.Module,
    batches: Iterable[Any],
    k: int,
    num_samples: int,
    place: Mapping[str, Any] | None,
    lora: Mapping[str, Any],
    device: torch.device | None,
) -> tuple[nn.Module, Placement]:
    """Return the adapted model and its placement. device: where it is scored, None: where it is. Collective."""
    with _on(model, device):
        scores = score(model, _dealt(batches), num_samples=num_samples)
    placement = place_scores(scores, k=k, **(place or {}))
    return apply(placement, model, **lora), placement


def _dealt(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield this rank's share of batches that are the same on every rank.

    They are begun with where score() reads them, which puts back the random numbers that a loader draws to begin.
    """
    has_peers = dist.is_available() and dist.is_initialized()
    yield from islice(batches, dist.get_rank() if has_peers else 0, None, dist.get_world_size() if has_peers else 1)


@contextmanager
def _on(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Have the model on a device for the length of a block: frameworks move it there only as they wrap it."""
    before = next(model.parameters()).device
    if device is None or before == device:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(before)
