"""Loads a model with transformers alone: whole on every rank, or sharded by its own tensor-parallel plan."""

from __future__ import annotations

from plop_dist.backends.hf import tp_plan
from plop_dist.backends.hf.load import load_model, needs_head
from plop_dist.backends.hf.model import HFModel, pick_device
from plop_dist.backends.hf.placing import is_placed
from plop_dist.backends.hf.whole import whole_model
from plop_dist.config.schema import Config


def load(config: Config) -> HFModel:
    """Return this rank's replica of the model, or its shard of one. Collective over the world.

    Raises ModelError, or LayoutError where the model has no tensor-parallel plan or its heads do not divide.
    """
    if config.parallel.tp > 1:
        return tp_plan.load(config)
    module = load_model(config.model)
    if not is_placed(config.model):
        module = module.to(pick_device())
    return whole_model(module, needs_head(config.placement.exclude))
