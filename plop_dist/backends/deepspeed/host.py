"""A host's DeepSpeed engine: which kind it is, and how it is wrapped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from plop_dist.backends.deepspeed import autotp, pipeline, zero
from plop_dist.backends.hosts import is_a
from plop_dist.backends.record import Found
from plop_dist.errors import ModelError


def find(engine: Any) -> Found:
    """Return how an engine is to be wrapped: a PipelineEngine, one that AutoTP has cut, or ZeRO of any stage. Local.

    Or a module without an engine that zero.Init has partitioned. Raises ModelError for one that is an engine's.
    """
    if not is_a(engine, "DeepSpeedEngine"):
        if hasattr(engine, "ds_inflight_param_registry"):
            raise ModelError(
                f"{type(engine).__name__} belongs to a DeepSpeed engine, which gathers its parameters; pass score() "
                "the engine that deepspeed.initialize returned."
            )
        return Found(
            "deepspeed", "zero_init", (engine,), lambda exclude: zero.wrap_module(engine, exclude), zero_stage=3
        )
    stage = engine.zero_optimization_stage()
    if is_a(engine, "PipelineEngine"):
        wrapper, wrap = "pipeline", pipeline.wrap
    elif any(is_a(module, "TensorParallel_Layer") for module in engine.modules()):
        wrapper, wrap = "autotp", autotp.wrap
    else:
        wrapper, wrap = "zero", zero.wrap
    found = Found(
        "deepspeed", wrapper, (engine,), lambda exclude: wrap(engine, exclude), zero_stage=stage,
        has_schedule=wrapper == "pipeline",
    )  # fmt: skip
    if wrapper == "zero" and stage == 3:
        return replace(found, keep=lambda: zero.as_partitioned(engine))
    return found
