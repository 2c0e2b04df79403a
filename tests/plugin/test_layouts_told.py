"""Layouts of torch's own that a host may bring: scored exactly, or refused by their name on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import plop_dist
from plop_dist.errors import LayoutError, ModelError
from tests.models import random_tokens, save_tiny
from tests.plugin.hosts import load
from tests.spawn import run_ranks

TP_PLAN = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}


def batches(rank: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": random_tokens(1, 9, seed=rank)}]


def by_tp(model: Any, mesh: Any) -> Any:
    for layer in model.model.layers:
        parallelize_module(layer.mlp, mesh, TP_PLAN)
    return model


def sharded(model: Any, mesh: Any) -> Any:
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    return model


def _job(rank: int, directory: Path) -> dict[str, float]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))

    def refused(model: Any, kind: type[Exception], words: str) -> None:
        with pytest.raises(kind, match=words):
            plop_dist.score(model, batches(rank))
        dist.barrier()

    refused(by_tp(load(directory), mesh["inner"]), LayoutError, "holds DTensors that neither fully_shard nor")
    refused(sharded(by_tp(load(directory), mesh["inner"]), mesh["outer"]), LayoutError, "on 2 of 4 ranks")
    refused(sharded(load(directory), mesh["inner"]), LayoutError, "on 2 of 4 ranks")
    refused(FullyShardedDataParallel(load(directory), device_id=torch.device("cpu")), ModelError, "FSDP1")
    stage: Any = load(directory)
    del stage.model.layers[rank % 2]
    refused(
        PipelineStage(stage, rank % 2, 2, torch.device("cpu"), group=mesh["inner"].get_group()),
        ModelError,
        "cannot read a PipelineStage",
    )
    refused(stage, LayoutError, "both seem to hold the whole model, but")
    scores = plop_dist.score(sharded(load(directory), mesh), batches(rank))  # HSDP
    return {module.fqn: module.nfn for module in scores.modules if module.nfn is not None}


@pytest.mark.slow
def test_four_ranks_are_exact_or_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    found = run_ranks(4, _job, tmp_path / "model")
    assert all(one == found[0] for one in found)
    rows = [batch for rank in range(4) for batch in batches(rank)]
    expected = plop_dist.score(load(tmp_path / "model"), rows)
    assert found[0] == pytest.approx({module.fqn: module.nfn for module in expected.modules}, rel=1e-6)
