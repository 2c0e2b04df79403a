"""Training in Megatron at any layout: Bridge's adapters, Megatron's schedules, a frozen base."""

# b samples, s tokens of the longest

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from torch import Tensor, nn

from plop_dist.backends.hf.load import load_tokenizer, meta_model
from plop_dist.backends.megatron.backend import describe_chunks, load_chunks
from plop_dist.backends.megatron.batch import context_share, left_justify
from plop_dist.backends.megatron.chunks import unwrap
from plop_dist.config.schema import Config
from plop_dist.errors import LayoutError, PlacementError
from plop_dist.measure.protocols import MicroBatch
from plop_dist.training import loop
from plop_dist.training.adapters.experts import fuse_experts
from plop_dist.training.adapters.initial import initial_adapter
from plop_dist.training.adapters.shards import AdapterShard, check_complete, lora_config, ranks_of
from plop_dist.training.engines.optimizer import AdapterOptimizer
from plop_dist.values.files import write_bytes
from plop_dist.values.mesh import nearest
from plop_dist.values.names import expert_index
from plop_dist.values.placement import Placement


def train(
    config: Config,
    placement: Placement,
    log: Callable[[dict[str, Any]], None],
    data: loop.Data | None = None,
) -> dict[str, Any]:
    """Train the adapters of a model loaded into Megatron; see loop.run for what it returns and writes.

    Besides the PEFT adapter, train/megatron_adapter holds Megatron's own distributed checkpoint of it. `data` replaces
    the configured training rows. Collective over all ranks. Raises MissingExtraError, LayoutError, PlacementError.
    """
    if data is None:
        from plop_dist.training.data import TrainingData

        data = TrainingData(config, load_tokenizer(config.model))
    return loop.run(MegatronEngine(config, placement), data, config, placement, log)


class MegatronEngine:
    """loop.Engine over the model chunks of this rank."""

    def __init__(self, config: Config, placement: Placement):
        _check(config, placement)
        chunks, self._bridge = load_chunks(config)
        from megatron.core import parallel_state as state

        self._config, self._placement = config, placement
        self._peft = placement.to_megatron(engine="canonical", dropout=config.train.lora_dropout)
        self._chunks: list[Any] = self._peft(chunks, training=True)
        self._peft.set_params_to_save(self._chunks)
        self._model_config = unwrap(self._chunks[0]).config
        self._model_config.variable_seq_lengths = config.parallel.pp > 1
        self._needs_mask = any(type(m).__name__ == "DotProductAttention" for m in self._chunks[0].modules())
        self.device = next(self._chunks[0].parameters()).device
        self._tp_size, self._tp_group = config.parallel.tp, state.get_tensor_model_parallel_group()
        self._pp_group, self._cp_group = state.get_pipeline_model_parallel_group(), state.get_context_parallel_group()
        self._cp = (dist.get_rank(self._cp_group), config.parallel.cp)
        self.dp_group = state.get_data_parallel_group()
        self.dp_rank, self.dp_size = dist.get_rank(self.dp_group), dist.get_world_size(self.dp_group)
        self._shards, names = self._find_shards()
        check_complete(names, placement)
        if config.parallel.pp > 1 and getattr(unwrap(self._chunks[0]), "pre_process", False):
            # A first stage without adapters would have nothing to send a gradient through.
            unwrap(self._chunks[0]).embedding.register_forward_hook(_require_grad)
        self._optimizer = AdapterOptimizer(
            self._shards,
            config.train,
            state.get_data_parallel_group(with_context_parallel=True),
            [self._pp_group] if config.parallel.pp > 1 else [],
        )

    def step(self, micro_batches: Sequence[loop.Batch], num_targets: int, learning_rate: float) -> tuple[float, float]:
        """Run one optimizer step through Megatron's schedule. See loop.Engine."""
        for chunk in self._chunks:
            chunk.train()
        # The schedule divides by the number of micro-batches and multiplies by the context-parallel size.
        total = self._run(micro_batches, len(micro_batches) / (num_targets * self._cp[1]), forward_only=False)
        grad_norm = self._optimizer.step(learning_rate, self.device)
        return loop.sum_over(self.dp_group, total, device=self.device)[0] / num_targets, grad_norm

    @torch.no_grad()
    def sum_loss(self, micro_batches: Sequence[loop.Batch]) -> float:
        """Return the summed loss without gradients. See loop.Engine."""
        for chunk in self._chunks:
            chunk.eval()
        return self._run(micro_batches, 1.0, forward_only=True)

    def state(self) -> dict[str, Any]:
        """Return this rank's adapter and optimizer state."""
        return self._optimizer.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what state() returned."""
        self._optimizer.load_state(state)

    def tracked(self, with_head: bool) -> loop.Tracked:
        """Return the adapted chunks for scoring. See loop.Engine."""
        model = describe_chunks(self._chunks, self._bridge, self._config, with_head)
        return loop.Tracked(model, self._shards, self._chunks)

    def save_adapter(self, directory: Path) -> None:
        """Write the adapter through Bridge in PEFT's format, and Megatron's own checkpoint. Collective."""
        self._bridge.save_hf_adapter(self._chunks, str(directory), peft_config=self._peft, show_progress=False)
        if dist.get_rank() == 0:
            # Bridge names types alone; the placement may hold only some modules of a type.
            peft_config = lora_config(self._placement, self._config)
            peft_config.inference_mode = True
            peft_config.base_model_name_or_path = self._config.model.name_or_path
            if _experts(self._placement):
                path = directory / "adapter_model.safetensors"
                whole = meta_model(self._config.model)
                write_bytes(path, save(fuse_experts(load_file(path), peft_config, whole), {"format": "pt"}))
            peft_config.save_pretrained(str(directory))
        self._save_distributed(directory.with_name("megatron_adapter"))

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

    def _run(self, micro_batches: Sequence[loop.Batch], scale: float, *, forward_only: bool) -> float:
        """Return the summed loss of the replica's micro-batches; gradients are of scale times that sum."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        prepared = [self._prepare(batch) for batch in micro_batches]

        def forward(source: Iterator[Any], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(source)
            targets = batch.labels
            output = chunk(batch.input_ids, batch.position_ids, batch.mask, labels=targets.clamp_min(0))

            def loss(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                total = losses.float().masked_select(targets >= 0).sum()
                return total * scale, {"total": total.detach()}

            return output, loss

        sources = [iter(prepared) for _ in self._chunks]
        stored = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=sources if len(sources) > 1 else sources[0],
            model=self._chunks if len(self._chunks) > 1 else self._chunks[0],
            num_microbatches=len(prepared),
            seq_length=prepared[0].input_ids.shape[1] * self._cp[1],
            micro_batch_size=prepared[0].input_ids.shape[0],
            forward_only=forward_only,
        )
        total = float(sum(float(entry["total"]) for entry in stored))  # the last stage's; others store nothing
        for group in (self._pp_group, self._cp_group):
            total = loop.sum_over(group, total, device=self.device)[0]
        return total

    def _prepare(self, batch: loop.Batch) -> Any:
        """Return what the chunk reads, padding last, with the next token's label at each place, negative: none."""
        targets = torch.full_like(batch["labels"], loop.IGNORED)
        targets[:, :-1] = batch["labels"][:, 1:]
        multiple = self._tp_size if self._model_config.sequence_parallel else 1
        multiple *= 2 * self._cp[1] if self._cp[1] > 1 else 1
        mask, positions = batch["attention_mask"], batch["position_ids"]
        micro_batch = MicroBatch(batch["input_ids"], mask, mask.long() - 1, positions, labels=targets)
        prepared = left_justify(micro_batch, multiple, with_mask=self._needs_mask, device=self.device)
        return prepared if self._cp[1] == 1 else context_share(prepared, *self._cp)

    def _find_shards(self) -> tuple[list[AdapterShard], set[str]]:
        """Return this rank's adapters, set to the initial ones, and the logical names of all ranks'. Collective."""
        from megatron.bridge.models.conversion.param_mapping import RowParallelMapping

        tp_rank = dist.get_rank(self._tp_group)
        tasks = self._bridge._model_bridge.build_adapter_conversion_tasks(self._chunks)
        shards, names = [], set()
        for task in (task for group in tasks.values() for task in group):
            into, out = task.linear_in_task, task.linear_out_task
            fqn = str(into.mapping.hf_param).removesuffix(".lora_A.weight")
            names.add(fqn)
            if into.megatron_module is None:
                continue  # another stage's
            A_dim = 1 if isinstance(into.mapping, RowParallelMapping) else 0
            A, B = into.megatron_module.weight, out.megatron_module.weight
            shard = AdapterShard(fqn, A, B, A_dim, 0, None, self._tp_group)
            _set_initial(shard, self._config.train.seed, tp_rank, self._tp_size)
            shards.append(shard)
        return shards, names


@torch.no_grad()
def _set_initial(shard: AdapterShard, seed: int, tp_rank: int, tp_size: int) -> None:
    rank = shard.A.shape[0] * (tp_size if shard.A_dim == 0 else 1)
    in_features = shard.A.shape[1] * (tp_size if shard.A_dim == 1 else 1)
    A, B = initial_adapter(shard.fqn, in_features, shard.B.shape[0], rank, seed)
    shard.A.copy_(A.chunk(tp_size, dim=shard.A_dim or 0)[tp_rank])
    shard.B.copy_(B)


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()


def _experts(placement: Placement) -> list[str]:
    return [fqn for fqn in placement.modules if expert_index(fqn) is not None]


def _check(config: Config, placement: Placement) -> None:
    lora_config(placement, config)  # what PEFT cannot express is known before hours of training
    tp, ep = config.parallel.tp, config.parallel.ep
    for rank in sorted(set(ranks_of(placement).values())):
        if rank % tp:
            fitting = " or ".join(str(tp * near) for near in nearest(rank // tp, range(1, rank // tp + 2)))
            raise LayoutError(
                f"placement.rank ({rank}) is not divisible by parallel.tp ({tp}): Megatron shards A along the rank; "
                f"use placement.rank={fitting}."
            )
    experts = _experts(placement)
    if experts and (tp > 1 or ep > 1):
        raise PlacementError(
            f"'{experts[0]}' is a routed expert; adapters of experts are trained at parallel.tp=1 and parallel.ep=1 "
            f"alone, not {tp} and {ep}; set placement.experts=false or those sizes to 1."
        )
