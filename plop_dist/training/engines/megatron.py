"""Training in Megatron at any layout: Bridge's adapters, Megatron's schedules, a frozen base."""

# b samples, s tokens of the longest, V entries of the vocabulary

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from plop_dist.backends.hf.load import load_hf_config, meta_model
from plop_dist.backends.megatron.backend import describe_chunks, load_chunks
from plop_dist.backends.megatron.batch import Batching, Prepared
from plop_dist.backends.megatron.chunks import unwrap
from plop_dist.backends.megatron.groups import read_place
from plop_dist.backends.megatron.latent import sum_rotary_gradients
from plop_dist.backends.megatron.schedule import run_schedule
from plop_dist.backends.megatron.vocab_parallel import VocabParallelLogits, hide_padding
from plop_dist.config.schema import Config
from plop_dist.errors import PlacementError
from plop_dist.measure.protocols import MicroBatch
from plop_dist.training.adapters.experts import fuse_experts
from plop_dist.training.adapters.initial import set_initial
from plop_dist.training.adapters.megatron_chunks import add_bridge_adapters, check_ranks
from plop_dist.training.adapters.placed import check_complete, lora_config, sizes_of
from plop_dist.training.adapters.saved import WEIGHTS, write_config, write_weights
from plop_dist.training.adapters.shards import AdapterShard, remove_wrapped
from plop_dist.training.batch import IGNORED, OBJECTIVE_KEYS, Batch
from plop_dist.training.engine import Tracked
from plop_dist.training.engines.optimizer import AdapterOptimizer
from plop_dist.training.logits import Objective, Read, next_tokens
from plop_dist.training.loop import StepEngine
from plop_dist.training.sums import from_last, sum_over
from plop_dist.values.names import expert_index
from plop_dist.values.placement import Placement

Base = tuple[list[nn.Module], Any]


class MegatronEngine:
    """An Engine over the model chunks of this rank."""

    def __init__(self, config: Config, placement: Placement, base: Base | None = None):
        _check(config, placement)
        chunks, self._bridge = base or _load(config, experts_apart=bool(_experts(placement)))
        self._before = {module: _outputs_of(module) for chunk in chunks for module in chunk.modules()}
        from megatron.core import parallel_state as state

        self._config, self._placement = config, placement
        self._peft = placement.to_megatron(engine="canonical", dropout=config.train.lora_dropout)
        self._chunks: list[Any] = chunks
        self._vocab_size = _vocab_size(config)
        self._hook = add_bridge_adapters([unwrap(chunk) for chunk in chunks], self._peft)
        self._peft.set_params_to_save(self._chunks)
        first = unwrap(self._chunks[0])
        first.config.variable_seq_lengths = config.parallel.pp > 1
        self._place = read_place(first.config)
        self.device = next(self._chunks[0].parameters()).device
        self._batching = Batching([unwrap(chunk) for chunk in self._chunks], self._place, self.device)
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

    def step(
        self,
        micro_batches: Sequence[Batch],
        num_targets: int,
        learning_rate: float,
        objective: Objective | None = None,
    ) -> tuple[float, float]:
        """Run one optimizer step through Megatron's schedule. See Engine."""
        for chunk in self._chunks:
            chunk.train()
        # The schedule divides by the number of micro-batches and multiplies by the context-parallel size.
        scale = len(micro_batches) / (num_targets * self._place.cp_size)
        total = math.fsum(self._run(micro_batches, scale, objective, forward_only=False))
        return total, self.optimizer.step(learning_rate, self.device)

    @torch.no_grad()
    def row_losses(self, micro_batches: Sequence[Batch]) -> list[float]:
        """Return each row's loss without gradients. See Engine."""
        for chunk in self._chunks:
            chunk.eval()
        return self._run(micro_batches, 1.0, None, forward_only=True)

    @torch.no_grad()
    def read_logits(self, micro_batches: Sequence[Batch], read: Read) -> list[Tensor]:
        """Return what is read of each micro-batch's logits, from the last stage. See RewardedEngine."""
        for chunk in self._chunks:
            chunk.eval()

        def found(output: Tensor, *, batch: Prepared) -> tuple[Tensor, dict[str, Any]]:
            return output.new_zeros(()), {"read": read(self._logits(output), _answers(batch))}

        prepared = [self._prepare(batch) for batch in micro_batches]
        stored = run_schedule(self._chunks, prepared, _forward, found, cp_size=1, forward_only=True)
        return from_last(self._pp_group, [entry["read"] for entry in stored], self.device)

    def generating(self) -> None:
        """Return nothing: Megatron's chunks are no transformers model. See RewardedEngine."""

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
        """Leave the chunks without adapters, their linears returning what they did before."""
        from megatron.bridge.peft.adapter_wrapper import AdapterWrapper

        for chunk in self._chunks:
            remove_wrapped(chunk, lambda module: module.to_wrap if isinstance(module, AdapterWrapper) else None)
        for module, outputs in self._before.items():
            vars(module).update(outputs)
        if self._hook is not None:
            self._hook.remove()

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

    def _run(
        self, micro_batches: Sequence[Batch], scale: float, objective: Objective | None, *, forward_only: bool
    ) -> list[float]:
        """Return the summed loss of each of the replica's rows, of each micro-batch where an objective says it.

        Gradients are of scale times their sum.
        """

        def loss(output: Tensor, *, batch: Prepared) -> tuple[Tensor, dict[str, Any]]:
            if objective is None:
                losses = output.float().masked_fill(_targets(batch) < 0, 0).sum(dim=1)
            else:
                losses = objective(self._logits(output), _answers(batch)).reshape(1)
            return losses.sum() * scale, {"losses": losses.detach()}

        prepared = [self._prepare(batch) for batch in micro_batches]
        call = _losses if objective is None else _forward
        stored = run_schedule(
            self._chunks, prepared, call, loss, cp_size=self._place.cp_size, forward_only=forward_only
        )
        # The last stage's; others store nothing.
        losses = [loss for entry in stored for loss in entry["losses"].tolist()]
        losses = losses or [0.0] * sum(1 if objective else len(batch["input_ids"]) for batch in micro_batches)
        for group in (self._pp_group, self._cp_group):
            losses = sum_over(group, *losses, device=self.device)
        return losses

    def _prepare(self, batch: Batch) -> Prepared:
        """Return what the chunks are called with; labels hold the next token's, negative: none."""
        mask = batch["attention_mask"]
        micro_batch = MicroBatch(batch["input_ids"], mask, mask - 1, batch["position_ids"])
        further = {name: batch[name] for name in OBJECTIVE_KEYS if name in batch}
        return self._batching.prepare(micro_batch, next_tokens(batch["labels"]), further)

    def _logits(self, output_bsV: Tensor) -> VocabParallelLogits:
        return VocabParallelLogits(output_bsV, self._tp_group, self._vocab_size)

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


def _forward(index: int, batch: Prepared, chunk: Any) -> Tensor:
    """Return the chunk's output: logits (b, s, V_local) from the last one, hidden states from the others."""
    return chunk(batch.input_ids, batch.position_ids, batch.mask)


def _answers(batch: Prepared) -> Batch:
    """Return what an objective reads of a micro-batch, as the chunks have it: its labels stand at their own place."""
    targets = _targets(batch)
    labels = torch.full_like(targets, IGNORED)
    labels[:, 1:] = targets[:, :-1]
    return {"labels": labels, **batch.further}


def _targets(batch: Prepared) -> Tensor:
    assert batch.labels is not None
    return batch.labels


def _outputs_of(module: nn.Module) -> dict[str, Any]:
    """Return what Bridge sets on a linear with a norm in it, so that an adapter gets the normed input."""
    names = ("return_layernorm_output", "return_layernorm_output_gathered")
    return {name: vars(module)[name] for name in names if name in vars(module)}


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


def _load(config: Config, *, experts_apart: bool = True) -> Base:
    """Return the chunks and what made them; apart, because one of several placements may adapt routed experts."""
    chunks, bridge = load_chunks(config, experts_apart=experts_apart)
    sum_rotary_gradients(chunks)
    hide_padding(chunks, _vocab_size(config))
    return chunks, bridge


def _vocab_size(config: Config) -> int:
    return load_hf_config(config.model).get_text_config().vocab_size


ENGINE = StepEngine(MegatronEngine, _load, methods=("sft", "grpo"))
