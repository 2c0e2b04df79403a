"""Training in Megatron at any layout: Bridge's adapters, Megatron's schedules, a frozen base."""

# b samples, s tokens of the longest

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from plop_dist.backends.hf.load import meta_model
from plop_dist.backends.megatron.backend import describe_chunks, load_chunks
from plop_dist.backends.megatron.batch import Batching, Prepared
from plop_dist.backends.megatron.chunks import unwrap
from plop_dist.backends.megatron.groups import read_place
from plop_dist.backends.megatron.schedule import run_schedule
from plop_dist.config.schema import Config
from plop_dist.errors import PlacementError
from plop_dist.measure.protocols import MicroBatch
from plop_dist.training.adapters.experts import fuse_experts
from plop_dist.training.adapters.initial import set_initial
from plop_dist.training.adapters.megatron_chunks import add_bridge_adapters, check_ranks
from plop_dist.training.adapters.placed import check_complete, lora_config, sizes_of
from plop_dist.training.adapters.saved import WEIGHTS, write_config, write_weights
from plop_dist.training.adapters.shards import AdapterShard
from plop_dist.training.batch import IGNORED, Batch
from plop_dist.training.engine import Tracked
from plop_dist.training.engines.optimizer import AdapterOptimizer
from plop_dist.training.loop import StepEngine
from plop_dist.training.sums import sum_over
from plop_dist.values.names import expert_index
from plop_dist.values.placement import Placement


class MegatronEngine:
    """An Engine over the model chunks of this rank."""

    def __init__(self, config: Config, placement: Placement):
        _check(config, placement)
        chunks, self._bridge = load_chunks(config)
        from megatron.core import parallel_state as state

        self._config, self._placement = config, placement
        self._peft = placement.to_megatron(engine="canonical", dropout=config.train.lora_dropout)
        self._chunks: list[Any] = chunks
        add_bridge_adapters([unwrap(chunk) for chunk in chunks], self._peft)
        self._peft.set_params_to_save(self._chunks)
        first = unwrap(self._chunks[0])
        first.config.variable_seq_lengths = config.parallel.pp > 1
        self._place = read_place(first.config)
        self._batching = Batching(first, self._place)
        self.device = next(self._chunks[0].parameters()).device
        self._tp_group: Any = state.get_tensor_model_parallel_group()
        self._pp_group: Any = state.get_pipeline_model_parallel_group()
        self._cp_group: Any = state.get_context_parallel_group()
        dp_group: Any = state.get_data_parallel_group()
        gradient_group: Any = state.get_data_parallel_group(with_context_parallel=True)
        self.dp_group: dist.ProcessGroup | None = dp_group
        self.dp_rank, self.dp_size = dist.get_rank(dp_group), dist.get_world_size(dp_group)
        self.shards, names = self._find_shards()
        check_complete(names, placement)
        set_initial(self.shards, config.train.seed)
        stages = [self._pp_group] if config.parallel.pp > 1 else []
        self.optimizer = AdapterOptimizer(self.shards, config.train, gradient_group, stages)

    def step(self, micro_batches: Sequence[Batch], num_targets: int, learning_rate: float) -> tuple[float, float]:
        """Run one optimizer step through Megatron's schedule. See Engine."""
        for chunk in self._chunks:
            chunk.train()
        # The schedule divides by the number of micro-batches and multiplies by the context-parallel size.
        scale = len(micro_batches) / (num_targets * self._place.cp_size)
        total = self._run(micro_batches, scale, forward_only=False)
        return total, self.optimizer.step(learning_rate, self.device)

    @torch.no_grad()
    def sum_loss(self, micro_batches: Sequence[Batch]) -> float:
        """Return the summed loss without gradients. See Engine."""
        for chunk in self._chunks:
            chunk.eval()
        return self._run(micro_batches, 1.0, forward_only=True)

    def tracked(self, with_head: bool) -> Tracked:
        """Return the adapted chunks for scoring. See Engine."""
        model = describe_chunks(self._chunks, self._bridge, self._config, with_head)
        return Tracked(model, self._chunks)

    def save_adapter(self, directory: Path) -> None:
        """Write the adapter through Bridge in PEFT's format, and Megatron's own checkpoint. Collective."""
        self._bridge.save_hf_adapter(self._chunks, str(directory), peft_config=self._peft, show_progress=False)
        if dist.get_rank() == 0:
            # Bridge names types alone; the placement may hold only some modules of a type.
            peft_config = lora_config(self._placement, self._config)
            if _experts(self._placement):
                whole = meta_model(self._config.model)
                write_weights(directory, fuse_experts(load_file(directory / WEIGHTS), peft_config, whole))
            write_config(directory, peft_config, self._config.stored()["model"]["name_or_path"])
        self._save_distributed(directory.with_name("megatron_adapter"))

    def close(self) -> None:
        """Give back nothing: what Megatron holds besides the model are its process groups."""

    def _save_distributed(self, directory: Path) -> None:
        from megatron.core import dist_checkpointing

        partial = directory.with_name(f".{directory.name}")
        if dist.get_rank() == 0:
            for stale in (partial, directory):
                shutil.rmtree(stale, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        keys = ["model"] if len(self._chunks) == 1 else [f"model{index}" for index in range(len(self._chunks))]
        tree = {
            key: {name: tensor for name, tensor in chunk.sharded_state_dict().items() if ".adapter." in name}
            for key, chunk in zip(keys, self._chunks, strict=True)
        }
        dist_checkpointing.save(tree, str(partial))
        dist.barrier()
        if dist.get_rank() == 0:
            partial.rename(directory)
        dist.barrier()

    def _run(self, micro_batches: Sequence[Batch], scale: float, *, forward_only: bool) -> float:
        """Return the summed loss of the replica's micro-batches; gradients are of scale times that sum."""

        def loss(output: Tensor, *, batch: Prepared) -> tuple[Tensor, dict[str, Any]]:
            total = output.float().masked_select(_targets(batch) >= 0).sum()
            return total * scale, {"total": total.detach()}

        prepared = [self._prepare(batch) for batch in micro_batches]
        stored = run_schedule(
            self._chunks, prepared, _losses, loss, cp_size=self._place.cp_size, forward_only=forward_only
        )
        total = float(sum(float(entry["total"]) for entry in stored))  # the last stage's; others store nothing
        for group in (self._pp_group, self._cp_group):
            total = sum_over(group, total, device=self.device)[0]
        return total

    def _prepare(self, batch: Batch) -> Prepared:
        """Return what the chunks are called with; labels hold the next token's, negative: none."""
        targets = torch.full_like(batch["labels"], IGNORED)
        targets[:, :-1] = batch["labels"][:, 1:]
        mask = batch["attention_mask"]
        micro_batch = MicroBatch(batch["input_ids"], mask, mask - 1, batch["position_ids"])
        return self._batching.prepare(micro_batch, targets)

    def _find_shards(self) -> tuple[list[AdapterShard], set[str]]:
        """Return this rank's adapters, and the logical names of all ranks'. Collective."""
        from megatron.bridge.models.conversion.param_mapping import RowParallelMapping

        tasks = self._bridge._model_bridge.build_adapter_conversion_tasks(self._chunks)
        shards, names = [], set()
        for task in (task for group in tasks.values() for task in group):
            into, out = task.linear_in_task, task.linear_out_task
            fqn = str(into.mapping.hf_param).removesuffix(".lora_A.weight")
            names.add(fqn)
            if into.megatron_module is None:
                continue  # another stage's
            # Of a column-parallel linear Megatron shards A along the rank.
            A_dim = 1 if isinstance(into.mapping, RowParallelMapping) else 0
            A, B = into.megatron_module.weight, out.megatron_module.weight
            shards.append(AdapterShard(fqn, A, B, A_dim, 0, None, self._tp_group))
        return shards, names


def _losses(index: int, batch: Prepared, chunk: Any) -> Tensor:
    """Return the chunk's output: each token's loss (b, s) from the last one, hidden states from the others."""
    return chunk(batch.input_ids, batch.position_ids, batch.mask, labels=_targets(batch).clamp_min(0))


def _targets(batch: Prepared) -> Tensor:
    assert batch.labels is not None
    return batch.labels


def _experts(placement: Placement) -> list[str]:
    return [fqn for fqn in placement.modules if expert_index(fqn) is not None]


def _check(config: Config, placement: Placement) -> None:
    peft_config = lora_config(placement, config)  # what PEFT cannot express is known before hours of training
    tp, ep = config.parallel.tp, config.parallel.ep
    check_ranks([rank for rank, _ in sizes_of(placement, peft_config).values()], tp)
    experts = _experts(placement)
    if experts and (tp > 1 or ep > 1):
        raise PlacementError(
            f"'{experts[0]}' is a routed expert; adapters of experts are trained at parallel.tp=1 and parallel.ep=1 "
            f"alone, not {tp} and {ep}; set placement.experts=false or those sizes to 1."
        )


ENGINE = StepEngine(MegatronEngine)
