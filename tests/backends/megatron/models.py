"""What the Megatron tests run in their ranks: load a layout, score it, and the float64 truth of one process."""

# T tokens, I in_features, O out_features

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from plop_dist.config.loading import parse_config
from plop_dist.measure.collector import Collector
from plop_dist.measure.protocols import MicroBatch, ScorableModel
from plop_dist.measure.sums import add_totals
from tests.models import random_tokens

LENGTHS = (5, 12, 9, 3, 12, 7)


def samples() -> list[Tensor]:
    """Return six rows of token ids of unequal lengths."""
    return [random_tokens(1, length, seed=number)[0] for number, length in enumerate(LENGTHS)]


def true_gains(
    directory: Path, rows: Sequence[Tensor], attention: str | None = None, model_class: Any = AutoModelForCausalLM
) -> dict[str, tuple[float, int]]:
    """Return per projection the mean gain and the number of tokens: float64, one row at a time, no padding."""
    model = model_class.from_pretrained(
        directory, dtype=torch.float64, experts_implementation="eager", attn_implementation=attention
    ).eval()
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def note(fqn: str, z_TI: Tensor, weight_OI: Tensor) -> None:
        if len(z_TI):
            seen[fqn].append((z_TI @ weight_OI.T).norm(dim=-1) / z_TI.norm(dim=-1))

    def linear(fqn: str) -> Any:
        return lambda module, args, _: note(fqn, args[0].flatten(0, -2), module.weight)

    def experts(fqn: str) -> Any:
        def observe(module: Any, args: Any, _: Any) -> None:
            hidden_TI, chosen_TK = args[0].flatten(0, -2), args[1]
            for expert in range(module.gate_up_proj.shape[0]):
                z_TI = hidden_TI[(chosen_TK == expert).any(dim=-1)]
                gate_OI, up_OI = module.gate_up_proj[expert].chunk(2)
                note(f"{fqn}.{expert}.gate_proj", z_TI, gate_OI)
                note(f"{fqn}.{expert}.up_proj", z_TI, up_OI)
                inner_TI = torch.nn.functional.silu(z_TI @ gate_OI.T) * (z_TI @ up_OI.T)
                note(f"{fqn}.{expert}.down_proj", inner_TI, module.down_proj[expert])

        return observe

    for fqn, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__.lower().endswith("topkrouter"):
            module.register_forward_hook(linear(fqn))
        elif hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, torch.nn.Parameter):
            module.register_forward_hook(experts(fqn))
    with torch.no_grad():
        for row in rows:
            model(row[None])
    return {fqn: (float(torch.cat(parts).mean()), len(torch.cat(parts))) for fqn, parts in seen.items()}


def micro_batches(rows: Sequence[Tensor], ids: Sequence[int], size: int, side: str) -> list[MicroBatch]:
    """Return padded micro-batches of `size` rows; ids: the calibration sample each row is."""
    found = []
    for start in range(0, len(rows), size):
        part, part_ids = rows[start : start + size], ids[start : start + size]
        longest = max(map(len, part)) + 1  # one column of nothing but padding
        tokens = torch.full((len(part), longest), 1)
        mask = torch.zeros_like(tokens)
        for line, row in enumerate(part):
            place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
            tokens[line, place], mask[line, place] = row, 1
        sample_ids = torch.tensor(part_ids)[:, None].expand_as(tokens).where(mask != 0, -1)
        found.append(MicroBatch(tokens, mask, sample_ids, position_ids=None))
    return found


def config(directory: Path, *, exclude: Sequence[str] = (), checkpoint: str | None = None, **parallel: Any) -> Any:
    """Return a configuration for the megatron backend in float32."""
    return parse_config(
        {
            "model": {"name_or_path": str(directory), "dtype": "float32", "checkpoint": checkpoint},
            "data": {"path": "unused"},
            "parallel": {"backend": "megatron", **parallel},
            "placement": {"exclude": list(exclude)},
        }
    )


def gains(model: ScorableModel, rows: Sequence[Tensor], *, size: int = 2, side: str = "right") -> dict[str, Any]:
    """Return the mean gain and token count per projection as the collector finds them. Collective over the world.

    Rows are dealt out to replicas in turn, so that replicas have different numbers and shapes of micro-batches.
    """
    ids = [number for number in range(len(rows)) if number % model.groups.num_replicas == model.groups.replica]
    batches = micro_batches([rows[number] for number in ids], ids, size, side)
    step = model.micro_batches_per_step
    collector = Collector(model)
    if model.groups.uniform_steps:
        most = max(collector.reducer.gather_objects(len(batches), "number of micro-batches"))
        filler = micro_batches([rows[0]], [-1], 1, side)
        batches += filler * (most - len(batches))
    parts = []
    with collector.attached():
        for start in range(0, len(batches), step):
            parts.append(collector.step(batches[start : start + step]))
    fqns = [projection.fqn for projection in collector.reducer.merge_projections(model.sites)]
    merged = collector.reducer.merge_totals(add_totals(parts, collector.owned), fqns, np.arange(len(rows)))
    totals, counts = merged.gain_total.sum(axis=1), merged.num_tokens.sum(axis=1)
    return {fqn: (total / max(count, 1), int(count)) for fqn, total, count in zip(fqns, totals, counts, strict=True)}


def worst(found: dict[str, Any], truth: dict[str, tuple[float, int]]) -> tuple[float, str]:
    """Return the largest relative error of a gain and where; names and token counts must agree exactly."""
    scored = {fqn: count for fqn, (_, count) in found.items() if count}
    assert scored == {fqn: count for fqn, (_, count) in truth.items()}, {
        fqn: (scored.get(fqn), truth.get(fqn))
        for fqn in {*scored, *truth}
        if scored.get(fqn) != truth.get(fqn, (0, 0))[1]
    }
    return max((abs(found[fqn][0] / truth[fqn][0] - 1), fqn) for fqn in truth)


def fresh() -> None:
    """Forget Megatron's process groups, so that the next load makes its own."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.barrier()


def logits(model: Any, row: Tensor) -> Tensor | None:
    """Return the logits (s, V) of one row on the ranks of the last pipeline stage, None elsewhere. Collective."""
    from megatron.core import parallel_state

    caught: list[Tensor] = []
    layer = getattr(model._bare[-1], "output_layer", None)
    handle = layer and layer.register_forward_hook(lambda module, args, output: caught.append(output[0]))
    ones = torch.ones_like(row)[None]
    model.forward([MicroBatch(row[None], ones, ones)], lambda _: None)
    if handle is None:
        return None
    handle.remove()
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(caught[0]) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, caught[0].contiguous(), group=group)
    return torch.cat(parts, dim=-1)[: len(row), 0]


def true_logits(directory: Path, row: Tensor, attention: str | None = None) -> Tensor:
    """Return transformers' logits (s, V) in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention).eval()
    with torch.no_grad():
        return model(row[None]).logits[0]
