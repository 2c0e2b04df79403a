"""Loads a model with transformers alone: whole in one process, or sharded by its own tensor-parallel plan."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from plop_dist.backends.hf.experts import find_expert_sites
from plop_dist.backends.hf.linears import LinearModule, find_linears
from plop_dist.backends.hf.load import load_model, needs_head
from plop_dist.backends.hf.model import HFModel, pick_device
from plop_dist.backends.hf.sites import Gather, LinearSite
from plop_dist.config.schema import Config
from plop_dist.measure.protocols import ScorableModel, Site


class TransformersBackend:
    """One process; tp and dp ranks through transformers' own DTensor plan (see tp_plan)."""

    def load(self, config: Config) -> ScorableModel:
        """Return the loaded model. Raises ModelError."""
        if config.parallel.world_size > 1:
            from plop_dist.backends.hf import tp_plan

            return tp_plan.load(config)
        module = load_model(config.model).to(pick_device())
        with_head = needs_head(config.placement.exclude)
        return HFModel(module, whole_sites(module, with_head), with_head=with_head)


def whole_sites(
    module: nn.Module, with_head: bool, gather: Gather | None = None, twin: nn.Module | None = None
) -> list[Site]:
    """Return the sites of a model none of whose features are sharded.

    gather: gives whole parameters where they are partitioned between forward passes (ZeRO-3, FSDP). twin: where
    adapters wrap linears of `module`, the same model without them, on the meta device; it may hold layers that
    `module`, a stage, does not.
    """
    linears = find_linears(module) if twin is None else _of_twin(twin, module)
    linears = [linear for linear in linears if with_head or linear.blocks[0].projection.type != "lm_head"]
    return [*(LinearSite(linear, gather=gather) for linear in linears), *find_expert_sites(module, gather)]


def _of_twin(twin: nn.Module, module: nn.Module) -> list[LinearModule]:
    modules = {path: inner for path, inner in module.named_modules() if not isinstance(inner, nn.Identity)}
    return [replace(linear, module=modules[linear.path]) for linear in find_linears(twin) if linear.path in modules]
