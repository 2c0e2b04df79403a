"""A host's DeepSpeed engine: which kind it is, and how it is wrapped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from plop_dist.backends.deepspeed import autotp, pipeline, zero
from plop_dist.backends.hosts import is_a
from plop_dist.backends.record import Found


def find(engine: Any) -> Found:
    """Return how an engine is to be wrapped: a PipelineEngine, one that AutoTP has cut, or ZeRO of any stage. Local."""
    stage = engine.zero_optimization_stage()
    if is_a(engine, "PipelineEngine"):
        wrapper, wrap = "pipeline", pipeline.wrap
    elif any(is_a(module, "TensorParallel_Layer") for module in engine.modules()):
        wrapper, wrap = "autotp", autotp.wrap
    else:
        wrapper, wrap = "zero", zero.wrap
    found = Found("deepspeed", wrapper, (engine,), lambda exclude: wrap(engine, exclude), zero_stage=stage)
    if wrapper == "zero" and stage == 3:
        return replace(found, keep=lambda: zero.as_partitioned(engine))
    return found
