"""The sites of a rank's model chunks: what each Megatron linear holds, how large it is, and how it is observed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from plop_dist.backends.megatron.classes import check_router, linear_kind
from plop_dist.backends.megatron.groups import Place
from plop_dist.backends.megatron.modules import weight_of
from plop_dist.backends.megatron.names import (
    HFNames,
    NamedLinear,
    find_named_linears,
    find_shared_gates,
    logical_projection,
    router_fqn,
)
from plop_dist.backends.megatron.shared_gate import GATE, SharedGateSite
from plop_dist.backends.megatron.sites import MegatronSite, RoutedSite, RouterSite, Splits
from plop_dist.measure.blocks import Block
from plop_dist.measure.protocols import Routing, Site
from plop_dist.values.scores import Projection


@dataclass(frozen=True)
class Logical:
    """What is known of the model besides Megatron's modules.

    names: Hugging Face names of Megatron's parameters. known: how the Hugging Face model holds its projections, if that
    is at hand. vocab_size: without padding; None: the padded one is real. with_head: whether the head is scored.
    uncalled: routers that transformers does not call.
    """

    names: HFNames
    known: Mapping[str, Projection] = field(default_factory=dict)
    vocab_size: int | None = None
    with_head: bool = False
    uncalled: Collection[str] = ()


def find_sites(chunks: Sequence[nn.Module], config: Any, place: Place, logical: Logical) -> list[Site]:
    """Return the sites of this rank's chunks, without wrappers, in the order of their modules; routers too. Local."""
    return [site for chunk in chunks for site in _ChunkSites(chunk, config, place, logical).find()]


class _ChunkSites:
    """One chunk's linears, turned into sites one by one."""

    def __init__(self, chunk: Any, config: Any, place: Place, logical: Logical) -> None:
        self._chunk, self._config, self._place, self._logical = chunk, config, place, logical
        self._modules: dict[str, Any] = dict(chunk.named_modules())
        self._splits: dict[str, Splits] = {}

    def find(self) -> Iterator[Site]:
        routers = set()
        for linear in find_named_linears(self._chunk, self._config, self._place.ep_rank, self._logical.names):
            if linear.router is not None and linear.router not in routers:
                routers.add(linear.router)
                yield self._router_site(linear, linear.router)
            if linear.path != "output_layer":
                yield self._site(linear)
            elif self._logical.with_head:
                yield self._head_site(linear)
        for module, fqn in find_shared_gates(self._chunk, self._logical.names):
            num_gates, hidden_size = module.get_parameter(GATE).shape
            projection = logical_projection(fqn, hidden_size, num_gates, self._logical.known)
            yield SharedGateSite(module, projection, is_sequence_parallel=self._place.is_sequence_parallel)

    def _site(self, linear: NamedLinear) -> Site:
        if linear.expert is not None:
            assert linear.router is not None
            routing = Routing(linear.router, linear.expert)
            splits = self._splits.setdefault(linear.path, Splits())
            return RoutedSite(linear.module, self._blocks(linear, 1), routing, linear.slot, splits)
        kind = linear_kind(linear.module)
        assert kind is not None
        num_shards = 1 if kind == "duplicated" else self._place.tp_size
        return MegatronSite(linear.module, self._blocks(linear, num_shards), kind, self._place, called=linear.called)

    def _router_site(self, linear: NamedLinear, name: str) -> RouterSite:
        """Return the site of the router that feeds an expert."""
        router = self._modules[linear.path.partition(".experts.")[0]].router
        check_router(router, name)
        fqn = router_fqn(name, self._logical.names)
        num_experts, hidden_size = router.weight.shape
        projection = logical_projection(fqn, hidden_size, num_experts, self._logical.known)
        return RouterSite(
            router, name, projection,
            is_sequence_parallel=self._place.is_sequence_parallel, is_scored=fqn not in self._logical.uncalled,
        )  # fmt: skip

    def _head_site(self, linear: NamedLinear) -> MegatronSite:
        """Return the site of the output layer, whose weight may be the embedding's, and padded."""
        chunk, place = self._chunk, self._place
        tied = getattr(chunk, "share_embeddings_and_output_weights", False)
        weight: Callable[[], Tensor] = (
            chunk.shared_embedding_or_output_weight if tied else lambda: weight_of(linear.module)
        )
        width, num_columns = weight().shape
        vocab = self._logical.vocab_size or width * place.tp_size
        projection = logical_projection(linear.parts[0].fqn, num_columns, vocab, self._logical.known)
        num_rows = min(max(vocab - place.tp_rank * width, 0), width)
        return MegatronSite(linear.module, [Block(projection)], "column", place, weight=weight, num_rows=num_rows)

    def _blocks(self, linear: NamedLinear, num_shards: int) -> list[Block]:
        """Return the projections in a linear's local rows, with their global sizes over `num_shards` ranks."""
        rows, columns = weight_of(linear.module, linear.slot).shape
        is_column = linear_kind(linear.module) in ("column", "grouped_column")
        blocks = []
        for part in linear.parts:
            share = rows if part.rows is None else rows // part.rows.period * part.rows.width
            out_features = share * num_shards if is_column else share
            in_features = columns if is_column else columns * num_shards
            projection = logical_projection(part.fqn, in_features, out_features, self._logical.known)
            blocks.append(Block(projection, part.rows))
        return blocks
