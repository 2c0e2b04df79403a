"""A Megatron model list as the collector sees it: token order, pipeline schedule, process groups, sites."""

# b samples, s tokens of the longest, T tokens

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plop_dist.backends.hf.linears import Block
from plop_dist.backends.megatron.batch import Prepared, context_share, left_justify
from plop_dist.backends.megatron.names import (
    HFNames,
    NamedLinear,
    find_named_linears,
    linear_kind,
    logical_projection,
    router_fqn,
)
from plop_dist.backends.megatron.sites import ExpertSite, MegatronSite, RouterSite
from plop_dist.errors import LayoutError, ModelError
from plop_dist.measure.protocols import Groups, MicroBatch, Routing, Site
from plop_dist.values.scores import Projection


class MegatronModel:
    """ScorableModel over the model chunks of this rank, at any layout that parallel_state describes.

    chunks: the model list, one per virtual pipeline stage, wrapped (DDP, Float16Module) or not. known: how the Hugging
    Face model holds its projections, if that is at hand. vocab_size: without padding; None: the padded one is real.
    Collective over the world; raises LayoutError and ModelError for what cannot be scored exactly.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        hf_names: HFNames,
        *,
        with_head: bool = False,
        known: Mapping[str, Projection] | None = None,
        vocab_size: int | None = None,
        architecture: str | None = None,
        model_type: str | None = None,
        num_parameters: int | None = None,
    ) -> None:
        from megatron.core import parallel_state

        self._chunks = list(chunks)
        self._bare = [unwrap(chunk) for chunk in chunks]
        self._config = self._bare[0].config
        self._with_head = with_head
        _check(self._config)
        self._tp_rank = parallel_state.get_tensor_model_parallel_rank()
        self._tp_size = parallel_state.get_tensor_model_parallel_world_size()
        self._pp_size = parallel_state.get_pipeline_model_parallel_world_size()
        self._cp = (parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size())
        self._is_sp = bool(self._config.sequence_parallel) and self._tp_size > 1
        self.device = next(self._bare[0].parameters()).device
        self.micro_batches_per_step = self._pp_size
        self.groups = read_groups(self._config)
        self._needs_mask = any(type(module).__name__ == "DotProductAttention" for module in self._bare[0].modules())
        self.sites = self._find_sites(hf_names, known, vocab_size, parallel_state.get_expert_model_parallel_rank())
        self._architecture, self._model_type = architecture or type(self._bare[0]).__name__, model_type
        self._num_parameters = num_parameters or _count_parameters(self._bare, self._config)

    def check(self, micro_batch: MicroBatch) -> None:
        """Raise ModelError for packed rows in a model without local attention."""
        self._prepare(micro_batch)

    def token_layout(self, micro_batch: MicroBatch) -> Tensor:
        """Return sample ids (s, b) in the order of this rank's hidden states: padding last, -1 where nothing counts."""
        return self._prepare(micro_batch).sample_ids.T.contiguous()

    def routed_layout(self, micro_batch: MicroBatch) -> Tensor:
        """Return (T_local,) sample ids of the tokens this rank's routers see.

        Under sequence parallelism its share; otherwise all, but -1 on tensor ranks that hold copies of rank 0's.
        """
        ids_T = self.token_layout(micro_batch).reshape(-1)
        if self._is_sp:
            return ids_T.chunk(self._tp_size)[self._tp_rank]
        return ids_T if self._tp_rank == 0 else torch.full_like(ids_T, -1)

    def forward(self, micro_batches: Sequence[MicroBatch], begin: Callable[[int], None]) -> None:
        """Run the micro-batches through Megatron's own schedule. Collective over the replica's ranks."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        prepared = [self._prepare(micro_batch) for micro_batch in micro_batches]
        # An interleaved schedule takes multiples of the pipeline's depth; what fills up is recorded nowhere.
        num_filler = -len(prepared) % self._pp_size if len(self._chunks) > 1 else 0
        prepared += [prepared[-1]] * num_filler

        def step(source: Iterator[tuple[int, Prepared]], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            index, batch = next(source)
            begin(index)
            return chunk(batch.input_ids, batch.position_ids, batch.mask), _nothing

        sources = [iter(enumerate(prepared)) for _ in self._chunks]
        with self._headless(), self._shapes(prepared), torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=sources if len(sources) > 1 else sources[0],
                model=self._chunks if len(self._chunks) > 1 else self._chunks[0],
                num_microbatches=len(prepared),
                seq_length=prepared[0].input_ids.shape[1] * self._cp[1],
                micro_batch_size=prepared[0].input_ids.shape[0],
                forward_only=True,
                collect_non_loss_data=True,
            )

    def describe(self) -> dict[str, Any]:
        """Return architecture, model_type (None without Bridge), number of parameters of the whole model, and dtype."""
        dtype = next(self._bare[0].parameters()).dtype
        return {
            "architecture": self._architecture,
            "model_type": self._model_type,
            "num_parameters": self._num_parameters,
            "dtype": str(dtype).removeprefix("torch."),
        }

    def release(self) -> None:
        """Give back nothing: what Megatron holds besides the model are its process groups, which training reuses."""

    def _prepare(self, micro_batch: MicroBatch) -> Prepared:
        multiple = (self._tp_size if self._is_sp else 1) * (2 * self._cp[1] if self._cp[1] > 1 else 1)
        prepared = left_justify(micro_batch, multiple, with_mask=self._needs_mask, device=self.device)
        return prepared if self._cp[1] == 1 else context_share(prepared, *self._cp)

    def _find_sites(
        self, hf_names: HFNames, known: Mapping[str, Projection] | None, vocab_size: int | None, ep_rank: int
    ) -> list[Site]:
        sites: list[Site] = []
        for chunk in self._bare:
            routers: dict[str, nn.Module] = {}
            modules = dict(chunk.named_modules())
            for linear in find_named_linears(chunk, self._config, ep_rank, hf_names):
                if linear.router is not None and linear.router not in routers:
                    router = routers[linear.router] = modules[linear.path.partition(".experts.")[0]].router
                    fqn = router_fqn(linear.router, hf_names)
                    projection = logical_projection(fqn, *reversed(router.weight.shape), known)
                    sites.append(RouterSite(router, linear.router, projection, is_sequence_parallel=self._is_sp))
                if linear.path == "output_layer":
                    if self._with_head:
                        sites.append(self._head_site(chunk, linear, known, vocab_size))
                elif linear.expert is not None:
                    assert linear.router is not None
                    routing = Routing(linear.router, linear.expert)
                    sites.append(ExpertSite(linear.module, self._blocks(linear, known, 1), routing, linear.slot))
                else:
                    kind = linear_kind(linear.module)
                    assert kind is not None
                    size = 1 if kind == "duplicated" else self._tp_size
                    sites.append(
                        MegatronSite(
                            linear.module,
                            self._blocks(linear, known, size),
                            kind,
                            tp_rank=self._tp_rank,
                            tp_size=self._tp_size,
                            is_sequence_parallel=self._is_sp,
                            called=linear.called,
                        )
                    )
        return sites

    def _head_site(
        self, chunk: Any, linear: NamedLinear, known: Mapping[str, Projection] | None, vocab_size: int | None
    ) -> MegatronSite:
        tied = getattr(chunk, "share_embeddings_and_output_weights", False)
        weight = chunk.shared_embedding_or_output_weight if tied else lambda: linear.module.weight
        width, num_columns = weight().shape
        vocab = vocab_size or width * self._tp_size
        projection = logical_projection(linear.parts[0].fqn, num_columns, vocab, known)
        return MegatronSite(
            linear.module,
            [Block(projection)],
            "column",
            tp_rank=self._tp_rank,
            tp_size=self._tp_size,
            is_sequence_parallel=self._is_sp,
            weight=weight,
            num_rows=min(max(vocab - self._tp_rank * width, 0), width),
        )

    def _blocks(self, linear: NamedLinear, known: Mapping[str, Projection] | None, size: int) -> list[Block]:
        kind = linear_kind(linear.module)
        weight = linear.module.weight if linear.slot is None else getattr(linear.module, f"weight{linear.slot}")
        rows, columns = weight.shape
        is_column = kind in ("column", "grouped_column")
        blocks = []
        for part in linear.parts:
            share = rows if part.rows is None else rows // part.rows.period * part.rows.width
            out_features = share * size if is_column else share
            in_features = columns if is_column else columns * size
            blocks.append(Block(logical_projection(part.fqn, in_features, out_features, known), part.rows))
        return blocks

    @contextmanager
    def _headless(self) -> Iterator[None]:
        """Let the output layer hand the hidden states through, unless it is scored; undone on leaving."""
        last = self._bare[-1]
        layer = getattr(last, "output_layer", None)
        if layer is None or self._with_head or "forward" in vars(layer):
            yield
            return
        layer.forward = lambda hidden, *_, **__: (hidden, None)
        try:
            yield
        finally:
            del layer.forward

    @contextmanager
    def _shapes(self, prepared: Sequence[Prepared]) -> Iterator[None]:
        """Let pipeline stages tell each other the shape of micro-batches that differ; undone on leaving."""
        before = self._config.variable_seq_lengths
        if self._pp_size > 1 and len({batch.input_ids.shape for batch in prepared}) > 1:
            self._config.variable_seq_lengths = True
        try:
            yield
        finally:
            self._config.variable_seq_lengths = before


def read_groups(config: Any) -> Groups:
    """Return the process groups that parallel_state holds, as the collector wants them."""
    from megatron.core import parallel_state as state

    def named(group: Any) -> Any:
        return group if group is not None and dist.get_world_size(group) > 1 else None

    tp_group = named(state.get_tensor_model_parallel_group())
    ep_group = state.get_expert_model_parallel_group()
    data_group = state.get_data_parallel_group(with_context_parallel=True)
    copies = {"tp": (dist.get_rank(data_group), dist.get_world_size(data_group))}
    if config.num_moe_experts:
        expert_data_group = state.get_expert_data_parallel_group()
        copies["etp"] = (dist.get_rank(expert_data_group), dist.get_world_size(expert_data_group))
    num_replicas = state.get_data_parallel_world_size()
    return Groups(
        features={"tp": tp_group} if tp_group is not None else {},
        routing=ep_group if config.num_moe_experts else None,
        copies=copies,
        stage=str(state.get_pipeline_model_parallel_rank()),
        replica=state.get_data_parallel_rank(),
        num_replicas=num_replicas,
        uniform_steps=bool(config.num_moe_experts) and dist.get_world_size(ep_group) > 1 and num_replicas > 1,
    )


def unwrap(chunk: nn.Module) -> Any:
    """Return the model inside DDP, FSDP and Float16Module wrappers."""
    while isinstance(getattr(chunk, "module", None), nn.Module):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def _nothing(output: Any, non_loss_data: bool = False) -> None:
    return None


def _check(config: Any) -> None:
    """Raise LayoutError or ModelError for what cannot be scored exactly."""
    from megatron.core import parallel_state

    if not config.num_moe_experts:
        return
    etp = parallel_state.get_expert_tensor_parallel_world_size()
    if etp > 1:
        raise LayoutError(
            f"expert_tensor_parallel_size is {etp}: Megatron then adds up an expert's output only after mixing it with "
            "other experts', so its norm is nowhere to be seen; use expert_tensor_parallel_size=1."
        )
    if config.moe_token_dispatcher_type not in ("allgather", "alltoall"):
        raise ModelError(
            f"moe_token_dispatcher_type is '{config.moe_token_dispatcher_type}': the order in which its experts "
            "receive tokens is not known; use 'alltoall' or 'allgather'."
        )
    if config.moe_pad_expert_input_to_capacity:
        raise ModelError(
            "moe_pad_expert_input_to_capacity is on: experts then also see tokens that were never routed to them; turn "
            "it off for scoring."
        )
    if config.moe_shared_expert_overlap:
        raise ModelError(
            "moe_shared_expert_overlap is on: shared experts then leave their sums to another stream; turn it off."
        )


def _count_parameters(chunks: Sequence[nn.Module], config: Any) -> int:
    """Return the number of parameters of the whole model. Collective over the world."""
    from megatron.core import parallel_state as state

    ep = state.get_expert_model_parallel_world_size() if config.num_moe_experts else 1
    tp = state.get_tensor_model_parallel_world_size()
    total = 0
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if getattr(parameter, "shared_embedding", False) and not getattr(chunk, "pre_process", True):
                continue  # the last stage's copy of tied embeddings
            if ".experts." in name and "shared_experts" not in name:
                total += parameter.numel() * ep
            else:
                total += parameter.numel() * (tp if getattr(parameter, "tensor_model_parallel", False) else 1)
    count = torch.tensor([total], dtype=torch.int64, device=next(chunks[0].parameters()).device)
    group = state.get_pipeline_model_parallel_group()
    if dist.get_world_size(group) > 1:
        dist.all_reduce(count, group=group)
    return int(count)
