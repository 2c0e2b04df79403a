"""What one rank of a layout holds and sends while scoring, by arithmetic on shapes alone: no weights, no ranks."""

# T tokens of a micro-batch

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from plop_dist.config.schema import ParallelConfig
from plop_dist.registry import BACKENDS, load
from plop_dist.values.mesh import share
from plop_dist.values.names import expert_index, layer_index
from plop_dist.values.scores import Projection

# Linears whose in_features tensor parallelism shards; every other one is sharded by out_features.
ROW_TYPES = frozenset(
    {"o_proj", "down_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "wo", "w2"}
)
_SQ_NORM_BYTES = 4  # float32


@dataclass(frozen=True)
class Shape:
    """What the arithmetic needs to know besides projections.

    num_layers; hidden_size; num_tokens: T, padding included, before context and sequence parallelism divide it;
    element_size: bytes per weight and activation; num_routed: experts per token (0: dense); num_experts: per layer.
    """

    num_layers: int
    hidden_size: int
    num_tokens: int
    element_size: int
    num_routed: int = 0
    num_experts: int = 0


@dataclass(frozen=True)
class ExpectedTraffic:
    """Collectives of one micro-batch as one rank sees them, and their payload in bytes."""

    num_collectives: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class Stage:
    """One rank of a pipeline stage (of the whole model without a pipeline).

    layers: those it runs; num_ranks: ranks alike; modules: projections it observes; num_parameters and weight_bytes:
    held between forward passes; activation_bytes: live at the widest point of a forward pass; scoring: what scoring
    sends; gathers: ZeRO-3's parameter all-gathers, which any forward pass pays.
    """

    index: int
    layers: range
    num_ranks: int
    modules: tuple[Projection, ...]
    num_parameters: int
    weight_bytes: int
    activation_bytes: int
    scoring: ExpectedTraffic
    gathers: ExpectedTraffic


def build_stages(
    model: nn.Module, projections: Sequence[Projection], parallel: ParallelConfig, shape: Shape
) -> list[Stage]:
    """Return one Stage per pipeline stage, in order; where sizes do not divide, the largest rank's.

    model: on any device, the meta device included. projections: those that are scored.
    """
    stages = []
    held = zip(_split_parameters(model, parallel, shape), _by_stage(projections, parallel, shape), strict=True)
    for index, (num_parameters, modules) in enumerate(held):
        layers = share(shape.num_layers, parallel.pp, index)
        gathers = ExpectedTraffic()
        if parallel.zero_stage == 3:
            gathers = ExpectedTraffic(_num_holders(model), num_parameters * shape.element_size)
            num_parameters = -(-num_parameters // parallel.dp)
        stages.append(
            Stage(
                index,
                layers,
                parallel.world_size // parallel.pp,
                tuple(modules),
                num_parameters,
                num_parameters * shape.element_size,
                activation_bytes(modules, parallel, shape),
                scoring_traffic(modules, parallel, shape),
                gathers,
            )
        )
    return stages


def scoring_traffic(modules: Sequence[Projection], parallel: ParallelConfig, shape: Shape) -> ExpectedTraffic:
    """Return what scoring one micro-batch sends on a rank that holds these modules.

    Tensor parallelism: one all-reduce of float32 squared norms, T per row: the output of every column-parallel
    projection and the input of every row-parallel one; under sequence parallelism also the inputs of column-parallel
    projections, the outputs of row-parallel ones, and both of routers, which it gathers. Expert parallelism: two
    all-gathers, of how many tokens each rank has, and of a table of int64 (sample id, and one entry per expert and
    layer) per token.
    """
    num_tokens = shape.num_tokens // parallel.cp
    dense = [item for item in modules if expert_index(item.fqn) is None]
    num_collectives, num_bytes = 0, 0
    if parallel.tp > 1 and dense:
        num_routers = sum(map(_is_router, dense))
        num_rows = len(dense) - num_routers
        if parallel.sequence_parallel:
            num_rows += 2 * num_routers + len(_column_parents(dense)) + sum(item.type in ROW_TYPES for item in dense)
        num_collectives += 1
        num_bytes += num_rows * num_tokens * _SQ_NORM_BYTES
    expert_layers = {item.layer for item in modules if expert_index(item.fqn) is not None}
    if parallel.ep > 1 and expert_layers:
        per_rank = num_tokens // (parallel.tp if parallel.sequence_parallel else 1)
        num_columns = 1 + len(expert_layers) * shape.num_experts
        num_collectives += 2
        num_bytes += parallel.ep * 8 * (1 + per_rank * num_columns)
    return ExpectedTraffic(num_collectives, num_bytes)


def activation_bytes(modules: Sequence[Projection], parallel: ParallelConfig, shape: Shape) -> int:
    """Return the bytes of activations alive at the widest point: residual, one block's own, and the noted norms.

    Attention scores are not counted (fused attention does not keep them); experts are taken as evenly loaded.
    """
    num_tokens = shape.num_tokens // parallel.cp
    per_rank = num_tokens // (parallel.tp if parallel.sequence_parallel else 1)
    widths: dict[str, int] = {}
    for item in modules:
        parent, size = item.fqn.rpartition(".")[0], item.in_features if item.type in ROW_TYPES else item.out_features
        if expert_index(item.fqn) is None:
            widths[parent] = widths.get(parent, 0) - (-size // parallel.tp)
    widest = max(widths.values(), default=0)
    experts = [item for item in modules if expert_index(item.fqn) is not None]
    if experts:
        one = [item for item in experts if item.fqn.rpartition(".")[0] == experts[0].fqn.rpartition(".")[0]]
        inner = sum(item.in_features if item.type.endswith("down_proj") else item.out_features for item in one)
        runs_together = load(BACKENDS, parallel.backend).runs_experts_together
        copies = shape.num_routed if runs_together else 1
        widest = max(widest, copies * (shape.hidden_size + inner))
    dense = [item for item in modules if expert_index(item.fqn) is None]
    noted = len(dense) + len(_column_parents(dense)) + sum(item.type in ROW_TYPES for item in dense)
    noted += 5 * shape.num_routed * len({item.layer for item in experts})  # gate, up, down and their two inputs
    live = per_rank * 2 * shape.hidden_size + num_tokens * widest
    return live * shape.element_size + noted * num_tokens * _SQ_NORM_BYTES


def on_one_rank(modules: Iterable[Projection], parallel: ParallelConfig, shape: Shape) -> dict[str, int]:
    """Return the largest number of modules of each type that any one rank observes."""
    most: Counter[str] = Counter()
    for held in _by_stage(modules, parallel, shape):
        most |= Counter(item.type for item in held)
    return dict(most)


def _by_stage(projections: Iterable[Projection], parallel: ParallelConfig, shape: Shape) -> list[list[Projection]]:
    """Return what the first rank of every stage observes: its layers, its share of the experts."""
    stage_of, own_experts = _stages_of_layers(parallel, shape), share(shape.num_experts, parallel.ep, 0)
    held: list[list[Projection]] = [[] for _ in range(parallel.pp)]
    for item in projections:
        expert = expert_index(item.fqn)
        if expert is None or expert in own_experts:
            held[-1 if item.layer is None else stage_of.get(item.layer, -1)].append(item)
    return held


def _stages_of_layers(parallel: ParallelConfig, shape: Shape) -> dict[int, int]:
    return {layer: index for index in range(parallel.pp) for layer in share(shape.num_layers, parallel.pp, index)}


def _split_parameters(model: nn.Module, parallel: ParallelConfig, shape: Shape) -> list[int]:
    """Return the number of parameters on one rank of each stage, before ZeRO-3 divides them."""
    stage_of = _stages_of_layers(parallel, shape)
    totals = [0] * parallel.pp
    modules = dict(model.named_modules())
    head = _head(model)
    after_layers = False
    for path, parameter in model.named_parameters():
        owner_path = path.rpartition(".")[0]
        layer = layer_index(path)
        size = -(-parameter.numel() // _num_shards(path, modules[owner_path], parameter, parallel))
        if layer is not None:
            after_layers = True
            totals[stage_of.get(layer, -1)] += size
            continue
        totals[-1 if after_layers else 0] += size
        is_tied = head is not None and parameter is head.weight and modules[owner_path] is not head
        if is_tied and parallel.pp > 1:
            totals[-1] += size  # the last stage keeps its own copy
    return totals


def _num_shards(path: str, owner: Any, parameter: Any, parallel: ParallelConfig) -> int:
    """Return into how many parts tensor or expert parallelism cuts a parameter."""
    if parameter.dim() == 3 and ".experts." in path:
        return parallel.ep
    if isinstance(owner, nn.Embedding) or path.endswith("lm_head.weight"):
        return parallel.tp if load(BACKENDS, parallel.backend).shards_vocabulary else 1
    is_linear = parameter.dim() == 2 and "." in path and not isinstance(owner, nn.LayerNorm)
    name = path.split(".")[-2]
    if is_linear and name not in ("gate", "router"):
        return parallel.tp
    has_shard_bias = path.endswith(".bias") and hasattr(owner, "weight") and owner.weight.dim() == 2
    return parallel.tp if has_shard_bias and name not in ROW_TYPES else 1


def _column_parents(dense: Iterable[Projection]) -> set[str]:
    """Return the modules whose column-parallel projections read one input together (q, k, v; gate, up)."""
    column = (item for item in dense if item.type not in ROW_TYPES and not _is_router(item))
    return {item.fqn.rpartition(".")[0] for item in column}


def _is_router(item: Projection) -> bool:
    return item.storage == "router" or (item.storage == "expert_parameter" and expert_index(item.fqn) is None)


def _num_holders(model: nn.Module) -> int:
    return sum(1 for module in model.modules() if any(True for _ in module.parameters(recurse=False)))


def _head(model: nn.Module) -> Any:
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    return get_output_embeddings() if get_output_embeddings else None
