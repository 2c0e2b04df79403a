"""Sums over real ranks: feature shards, token shards and routed experts equal one process, at a constant traffic."""

# T tokens, I in_features, O out_features, E experts

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from plop_dist.config.schema import EstimatorConfig
from plop_dist.measure.baseline import compute_baselines
from plop_dist.measure.collectives import Reducer
from plop_dist.measure.collector import Collector
from plop_dist.measure.norms import local_sq_norm
from plop_dist.measure.protocols import Groups, LocalWeight, MicroBatch, Part, Recorder, Routing
from plop_dist.measure.weight import Weight
from plop_dist.values.mesh import share
from plop_dist.values.scores import Projection
from tests.spawn import run_ranks

NUM_RANKS = 2
KINDS = ("column", "row", "sequence", "whole")
I, O, E = 12, 10, 4  # noqa: E741
SAMPLE_IDS = torch.tensor([[0, 0, 0, 0, -1, -1], [1, 1, 1, 1, 1, 1]])


def normal(*shape: int, key: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(key))


def weight_of(number: int) -> Tensor:
    """Return (O, I) with rows of very different scales and a strong common direction."""
    return torch.exp(normal(O, 1, key=number)) * (normal(O, I, key=number + 1) + 2 * normal(1, I, key=number + 2))


def tokens_of(number: int) -> Tensor:
    return torch.exp(normal(12, 1, key=number + 3)) * normal(12, I, key=number + 4)


class ShardedSite:
    """One projection sharded over the ranks as `kind` says; forward records what a framework's linear would show."""

    group, holder = "tp", None

    def __init__(self, kind: str, number: int, rank: int) -> None:
        self.kind, self.number, self.rank = kind, number, rank
        self.projections = (Projection(fqn=f"{number}.{kind}", type=kind, in_features=I, out_features=O),)
        self.recorder: Recorder | None = None

    def attach(self, recorder: Recorder) -> Callable[[], None]:
        self.recorder = recorder
        return lambda: setattr(self, "recorder", None)

    def run(self) -> None:
        assert self.recorder is not None
        z_TI, weight_OI = tokens_of(self.number), weight_of(self.number)
        y_TO = z_TI @ weight_OI.T
        rows, columns, tokens = (part(size, self.rank) for size in (O, I, 12))
        if self.kind == "column":  # z whole, this rank's output features
            self.recorder.record(self, local_sq_norm(z_TI), [local_sq_norm(y_TO[:, rows])], out_part=Part.PARTIAL)
        elif self.kind == "row":  # this rank's input features, the reduced output
            self.recorder.record(self, local_sq_norm(z_TI[:, columns]), [local_sq_norm(y_TO)], in_part=Part.PARTIAL)
        elif self.kind == "sequence":  # this rank's tokens in, its output features of every token out
            out = [local_sq_norm(y_TO[:, rows])]
            self.recorder.record(self, local_sq_norm(z_TI[tokens]), out, in_part=Part.TOKENS, out_part=Part.PARTIAL)
        else:
            self.recorder.record(self, local_sq_norm(z_TI), [local_sq_norm(y_TO)])

    @contextmanager
    def weights(self) -> Iterator[Iterator[LocalWeight]]:
        weight_OI, projection = weight_of(self.number), self.projections[0]
        if self.kind == "row":
            index = part(I, self.rank)
            yield iter([LocalWeight(projection, Weight.of(weight_OI[:, index]), True, index)])
        elif self.kind == "whole":
            yield iter([LocalWeight(projection, Weight.of(weight_OI))])
        else:
            yield iter([LocalWeight(projection, Weight.of(weight_OI[part(O, self.rank)]), True)])


class RoutedSite(ShardedSite):
    """One routed expert, alone on its rank; its tokens come from all ranks in the order (source rank, token)."""

    group = "etp"

    def __init__(self, expert: int) -> None:
        super().__init__("whole", 100 + expert, 0)
        self.expert = expert
        self.projections = (Projection(fqn=f"experts.{expert}.up", type="up", in_features=I, out_features=O),)

    def run(self) -> None:
        assert self.recorder is not None
        z_TI = torch.cat([routed_tokens(rank)[routing_map(rank)[:, self.expert]] for rank in range(NUM_RANKS)])
        out = [local_sq_norm(z_TI @ weight_of(self.number).T)]
        self.recorder.record(self, local_sq_norm(z_TI), out, routing=Routing("router", self.expert))


def part(size: int, rank: int) -> slice:
    own = share(size, NUM_RANKS, rank)
    return slice(own.start, own.stop)


def routed_tokens(rank: int) -> Tensor:
    return normal(5 + rank, I, key=200 + rank)  # ranks hold different numbers of tokens


def routed_ids(rank: int) -> Tensor:
    return torch.tensor([0, 0, 1, -1, 1] if rank == 0 else [1, 0, -1, 0, 1, 1])


def routing_map(rank: int) -> Tensor:
    map_TE = normal(5 + rank, E, key=300 + rank) > 0
    map_TE[:, E - 1] = False  # one expert gets no token
    return map_TE


class FakeModel:
    """A ScorableModel whose forward only lets its sites record."""

    micro_batches_per_step = 1
    device = torch.device("cpu")

    def __init__(self, sites: Sequence[ShardedSite], groups: Groups, routes: bool) -> None:
        self.sites, self.groups, self._routes = sites, groups, routes

    def token_layout(self, micro_batch: MicroBatch) -> Tensor:
        return micro_batch.sample_ids

    def routed_layout(self, micro_batch: MicroBatch) -> Tensor:
        return routed_ids(dist.get_rank())

    def forward(self, micro_batches: Sequence[MicroBatch], begin: Callable[[int], None]) -> None:
        for index in range(len(micro_batches)):
            begin(index)
            for site in self.sites:
                site.run()
            if self._routes:
                assert self.sites[0].recorder is not None
                self.sites[0].recorder.record_routing("router", routing_map(dist.get_rank()))

    def watching(self) -> AbstractContextManager[Sequence[Projection]]:
        return nullcontext(())

    def release(self) -> None: ...

    def describe(self) -> dict[str, Any]:
        return {}


def sum_up(sites: Sequence[ShardedSite], groups: Groups, *, routes: bool = False) -> tuple[dict[str, Any], int]:
    """Return per path the gain and token sums of samples 0 and 1, and the collectives of one step."""
    model = FakeModel(sites, groups, routes)
    reducer = Reducer(groups)
    collector = Collector(model, reducer)
    batch = MicroBatch(SAMPLE_IDS, (SAMPLE_IDS >= 0).long(), SAMPLE_IDS)
    with collector.attached():
        owned = collector.step([batch])
    num_collectives = reducer.traffic.num_collectives
    fqns = [p.fqn for p in reducer.merge_projections(sites)]
    totals = reducer.merge_totals(owned, fqns, np.arange(2))
    return {
        fqn: (gain.tolist(), tokens.tolist())
        for fqn, gain, tokens in zip(fqns, totals.gain_total, totals.num_tokens, strict=True)
    }, num_collectives


def on_a_rank(rank: int) -> dict[str, Any]:
    sharded = Groups(features={"tp": dist.group.WORLD})
    sites = [ShardedSite(kind, 10 * number, rank) for number, kind in enumerate(KINDS * 2)]
    sums, num_collectives = sum_up(sites, sharded)
    _, num_collectives_of_few = sum_up(sites[:3], sharded)

    experts = [RoutedSite(expert) for expert in range(E) if expert % NUM_RANKS == rank]
    routed, num_routed = sum_up(experts, Groups(routing=dist.group.WORLD, stage=str(rank)), routes=True)

    # Without a group this rank is alone, though there is a world: only rank 0 asks, and must not wait for the other.
    alone = Reducer(Groups())
    if rank == 0:
        ids_T, (map_TE,) = alone.gather_routing(routed_ids(0), [routing_map(0)], "routing")
        assert torch.equal(ids_T, routed_ids(0))
        assert torch.equal(map_TE, routing_map(0))
        row = torch.ones(3)
        assert alone.complete([(row, Part.PARTIAL)], "tp", "sum")[0] is row
        assert alone.sum_flat([row], None, "sum")[0] is row
        assert alone.is_owner("tp")
        assert alone.size("tp") == 1
        assert alone.traffic.num_collectives == 0

    fqns = [site.projections[0].fqn for site in sites]
    baselines = {
        name: {
            fqn: (found.value, found.stderr)
            for fqn, found in compute_baselines(
                FakeModel(sites, sharded, False), EstimatorConfig(baseline=name), Reducer(sharded), fqns
            ).items()
        }
        for name in ("control_variate", "gaussian", "closed_form", "exact")
    }
    return {
        "sums": sums,
        "collectives": (num_collectives, num_collectives_of_few),
        "routed": routed,
        "routed_collectives": num_routed,
        "baselines": baselines,
    }


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(NUM_RANKS, on_a_rank)


def expected_sums(z_TI: Tensor, weight_OI: Tensor, ids_T: Tensor) -> tuple[list[float], list[int]]:
    z_TI, weight_OI = z_TI.double(), weight_OI.double()
    gain_T = (z_TI @ weight_OI.T).norm(dim=1) / z_TI.norm(dim=1)
    own = [ids_T == sample for sample in (0, 1)]
    return [float(gain_T[mask].sum()) for mask in own], [int(mask.sum()) for mask in own]


@pytest.mark.slow
def test_feature_and_token_shards_equal_one_process(results: list[dict[str, Any]]) -> None:
    assert results[0]["sums"] == results[1]["sums"]
    assert len(results[0]["sums"]) == 2 * len(KINDS)
    for fqn, (gain, tokens) in results[0]["sums"].items():
        number = int(fqn.split(".")[0])
        expected = expected_sums(tokens_of(number), weight_of(number), SAMPLE_IDS.flatten())
        assert gain == pytest.approx(expected[0], rel=1e-5), fqn
        assert tokens == expected[1] == [4, 6], fqn


@pytest.mark.slow
def test_one_collective_whatever_the_number_of_modules(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["collectives"] == (1, 1)
        assert result["routed_collectives"] == 2


@pytest.mark.slow
def test_routed_tokens_find_their_samples(results: list[dict[str, Any]]) -> None:
    z_TI = torch.cat([routed_tokens(rank) for rank in range(NUM_RANKS)])
    ids_T = torch.cat([routed_ids(rank) for rank in range(NUM_RANKS)])
    map_TE = torch.cat([routing_map(rank) for rank in range(NUM_RANKS)])
    routed = results[0]["routed"]
    assert routed == results[1]["routed"]
    assert list(routed) == [f"experts.{expert}.up" for expert in range(E)]
    for expert in range(E):
        gain, tokens = routed[f"experts.{expert}.up"]
        mine = map_TE[:, expert]
        expected = expected_sums(z_TI[mine], weight_of(100 + expert), ids_T[mine])
        assert gain == pytest.approx(expected[0], rel=1e-5)
        assert tokens == expected[1]
    assert routed[f"experts.{E - 1}.up"][1] == [0, 0]


@pytest.mark.slow
def test_baselines_of_shards_equal_those_of_the_whole_weight(results: list[dict[str, Any]]) -> None:
    assert results[0]["baselines"] == results[1]["baselines"]
    for name, found in results[0]["baselines"].items():
        for fqn, (value, stderr) in found.items():
            number, kind = int(fqn.split(".")[0]), fqn.split(".")[1]
            site = ShardedSite("whole", number, 0)
            site.projections = (Projection(fqn=fqn, type=kind, in_features=I, out_features=O),)
            whole = compute_baselines(
                FakeModel([site], Groups(), False), EstimatorConfig(baseline=name), Reducer(Groups()), [fqn]
            )[fqn]
            assert value == pytest.approx(whole.value, rel=1e-6), (name, fqn)
            assert stderr == pytest.approx(whole.stderr, rel=1e-4, abs=1e-9), (name, fqn)
