"""What repeated calls leave in a host's process: no thread, no descriptor, no memory, no flag."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import plop_dist
from plop_dist.errors import WorkerError
from tests.models import random_tokens, tiny
from tests.spawn import run_ranks

NUM_CALLS = 41
NUM_FIRST = 5  # in which libraries start threads and fill caches of their own


def held() -> tuple[int, int, int]:
    """Return this process's threads, descriptors, and resident memory in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return threading.active_count(), len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE")


def flags() -> dict[str, Any]:
    """Return what torch keeps for a whole process that a forward pass could have changed."""
    return {
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "autocast's cache": torch.is_autocast_cache_enabled(),
        "cudnn": tuple(getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")),
        "precision": (torch.get_float32_matmul_precision(), torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "compiler": torch.compiler.is_compiling(),
    }


def _job(rank: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    model = nn.parallel.DistributedDataParallel(tiny("llama"))
    batches = [{"input_ids": random_tokens(2, 9, seed=rank)}]
    for _ in range(NUM_FIRST):
        plop_dist.score(model, batches)
    before = held()
    for _ in range(NUM_CALLS - NUM_FIRST):
        plop_dist.score(model, batches)
    return before, held()


@pytest.mark.slow
def test_many_calls_in_two_ranks_leave_nothing_behind() -> None:
    for before, after in run_ranks(2, _job):
        assert after[:2] == before[:2]
        assert after[2] - before[2] < 4 << 20


@pytest.mark.parametrize("fails", [False, True])
def test_the_hosts_own_forward_leaves_no_flag(fails: bool) -> None:
    model = tiny("llama").train()
    frozen = dict(model.named_parameters())["model.embed_tokens.weight"].requires_grad_(False)

    def forward(model: Any, batch: Any) -> None:
        torch.rand(3)  # the host's own draws are undone, too
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**batch)
            if fails:
                raise RuntimeError("out of luck")

    before, state = flags(), torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        if fails:
            with pytest.raises(WorkerError, match="out of luck"):
                plop_dist.score(model, [{"input_ids": random_tokens(1, 9)}], forward=forward)
        else:
            plop_dist.score(model, [{"input_ids": random_tokens(1, 9)}], forward=forward)
    assert flags() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not frozen.requires_grad
