"""Loads a model with DeepSpeed: data-parallel ranks at any ZeRO stage; AutoTP and pipelines in their own files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from torch import nn

from plop_dist.backends.hf.backend import whole_sites
from plop_dist.backends.hf.load import load_model, needs_head
from plop_dist.backends.hf.model import HFModel, pick_device
from plop_dist.config.schema import Config
from plop_dist.measure.protocols import Groups, ScorableModel


class DeepSpeedBackend:
    """ZeRO 0 to 3 over dp ranks, AutoTP when parallel.tp > 1, PipelineModule when parallel.pp > 1."""

    def load(self, config: Config) -> ScorableModel:
        """Return the loaded model. Raises ModelError or LayoutError."""
        if config.parallel.tp > 1:
            from plop_dist.backends.deepspeed import autotp

            return autotp.load(config)
        if config.parallel.pp > 1:
            from plop_dist.backends.deepspeed import pipeline

            return pipeline.load(config)
        if config.parallel.zero_stage == 3 and dist.is_initialized():
            return _load_partitioned(config)
        # Without gradients and optimizer states, stages 0 to 2 hold the same: whole weights on every rank.
        module = load_model(config.model).to(pick_device())
        with_head = needs_head(config.placement.exclude)
        sites = whole_sites(module, with_head)
        return HFModel(module, sites, groups=data_parallel_groups(uniform=False), with_head=with_head)


def wrap(engine: Any, exclude: Sequence[str]) -> HFModel:
    """Return a host's DeepSpeed engine (ZeRO 0 to 3, no tensor or pipeline parallelism) as the collector sees it."""
    with_head = needs_head(list(exclude))
    is_partitioned = engine.zero_optimization_partition_weights()
    sites = whole_sites(engine.module, with_head, gather=gathered if is_partitioned else None)
    num_parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
    return HFModel(
        engine.module,
        sites,
        groups=data_parallel_groups(uniform=is_partitioned),
        call=engine,
        with_head=with_head,
        num_parameters=num_parameters,
    )


def data_parallel_groups(uniform: bool) -> Groups:
    """Return the groups of ranks that all hold every module: each is a replica, and they share the baseline work."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return Groups(copies={"tp": (rank, size)}, replica=rank, num_replicas=size, uniform_steps=uniform)


def gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """Gather partitioned parameters for the length of a block. Collective: every rank must enter."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def _load_partitioned(config: Config) -> ScorableModel:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    device = pick_device()
    # Before any from_pretrained, or transformers and TRL miscount the ranks.
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    settings = {
        "train_micro_batch_size_per_gpu": config.data.batch_size,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    # While this object lives, from_pretrained builds under zero.Init: each parameter is cut up as soon as it exists.
    partitioning = HfDeepSpeedConfig(settings)
    module = load_model(config.model)
    engine, *_ = deepspeed.initialize(model=module, config=settings)
    del partitioning
    engine.eval()
    model = wrap(engine, config.placement.exclude)
    model.device = device
    model.release = engine.destroy
    return model
