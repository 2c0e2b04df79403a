"""Two real ranks give what one process gives: feature shards, token shares, routed experts, replicas, copies."""

# T tokens, I in_features, O out_features, E experts

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from plop_dist import norms
from plop_dist.config import EstimatorConfig, PlacementConfig
from plop_dist.errors import LayoutError
from plop_dist.protocols import Groups, LocalWeight, MicroBatch, Part, Recorder, Routing
from plop_dist.reduce import Reducer
from plop_dist.scoring import Pass, score_model
from plop_dist.types import Projection
from tests.spawn import run_ranks

BATCH, LENGTH = 2, 6
SAMPLE_IDS = torch.tensor([[0, 0, 0, 0, -1, -1], [1, 1, 1, 1, 1, -1]])
T = BATCH * LENGTH
KINDS = ("column", "row", "sequence_column", "sequence_row", "replicated")
BASELINES = ("control_variate", "gaussian", "closed_form", "exact")
INFO: dict[str, Any] = {"model": {"name_or_path": "scripted"}, "data": {}, "parallel": {}}


def draw(name: str, *shape: int) -> Tensor:
    """Return the same unequal, correlated values on every rank, float32."""
    generator = torch.Generator().manual_seed(sum(ord(letter) * 31**k for k, letter in enumerate(name)) % 2**31)
    noise = torch.randn(*shape, generator=generator)
    scale = torch.exp(1.5 * torch.randn(*shape[:-1], 1, generator=generator))
    return scale * (noise + 2 * torch.randn(1, shape[-1], generator=generator))


class ScriptedSite:
    """A site that records what a sharded module of its kind would see on this rank."""

    def __init__(self, layer: int, kind: str, rank: int, size: int) -> None:
        fqn = f"layers.{layer}.{kind}"
        self.kind, self.rank, self.size, self.group = kind, rank, size, "tp"
        self.projections = (Projection(fqn=fqn, type=kind, layer=layer, in_features=8, out_features=6),)
        self.weight_OI = draw(fqn, 6, 8)
        self.recorder: Recorder | None = None

    def attach(self, recorder: Recorder) -> Callable[[], None]:
        self.recorder = recorder
        return lambda: setattr(self, "recorder", None)

    @contextmanager
    def weights(self) -> Iterator[Iterator[LocalWeight]]:
        (projection,) = self.projections
        if self.kind.endswith("column"):
            local = LocalWeight(projection, self.weight_OI.chunk(self.size)[self.rank], True)
        elif self.kind.endswith("row"):
            columns = torch.arange(8).chunk(self.size)[self.rank]
            local = LocalWeight(projection, self.weight_OI[:, columns], True, columns)
        else:
            local = LocalWeight(projection, self.weight_OI)
        yield iter([local])

    def run(self, micro_batch: int) -> None:
        assert self.recorder is not None
        z_TI = draw(f"{self.projections[0].fqn}.{micro_batch}", T, 8)
        y_TO = z_TI @ self.weight_OI.T
        z_parts, y_parts = z_TI.chunk(self.size, dim=1), y_TO.chunk(self.size, dim=1)
        share = slice(self.rank * T // self.size, (self.rank + 1) * T // self.size)
        z, y, in_part, out_part = {
            "column": (z_TI, y_parts[self.rank], Part.WHOLE, Part.PARTIAL),
            "row": (z_parts[self.rank], y_TO, Part.PARTIAL, Part.WHOLE),
            "sequence_column": (z_TI[share], y_parts[self.rank], Part.TOKENS, Part.PARTIAL),
            "sequence_row": (z_parts[self.rank], y_TO[share], Part.PARTIAL, Part.TOKENS),
            "replicated": (z_TI, y_TO, Part.WHOLE, Part.WHOLE),
        }[self.kind]
        self.recorder.record(
            self,
            self.recorder.sq_norm(z),
            [norms.local_sq_norm(y)],
            in_part=in_part,
            out_part=out_part,
            leading_shape=(BATCH, LENGTH),
        )

    def gains(self, micro_batch: int) -> Tensor:
        z_TI = draw(f"{self.projections[0].fqn}.{micro_batch}", T, 8).double()
        return (z_TI @ self.weight_OI.double().T).norm(dim=1) / z_TI.norm(dim=1)


class ExpertSite(ScriptedSite):
    """Expert `rank` of a router whose map covers all ranks' tokens (or only this rank's, without a routing group)."""

    def __init__(self, layer: int, rank: int, replica: int, is_exchanged: bool) -> None:
        super().__init__(layer, f"experts.{rank}.up", 0, 1)
        self.group, self.expert, self.replica, self.is_exchanged = "etp", rank, replica, is_exchanged

    def run(self, micro_batch: int) -> None:
        assert self.recorder is not None
        own = local_tokens(self.replica)
        map_TE = routing_map(self.projections[0].layer)
        router = f"layers.{self.projections[0].layer}.router"
        self.recorder.record_routing(router, map_TE[own])
        chosen_T = map_TE[:, self.expert].clone()
        if not self.is_exchanged:
            chosen_T &= torch.zeros(T, dtype=torch.bool).index_fill_(0, own, True)
        z_TI = draw(f"{self.projections[0].fqn}.{micro_batch}", T, 8)[chosen_T]
        self.recorder.record(
            self,
            norms.local_sq_norm(z_TI),
            [norms.local_sq_norm(z_TI @ self.weight_OI.T)],
            routing=Routing(router, self.expert),
        )


def local_tokens(replica: int) -> Tensor:
    """Rank 0 routes 7 of the 12 tokens, rank 1 the other 5."""
    return torch.arange(7) if replica == 0 else torch.arange(7, T)


def routing_map(layer: int | None) -> Tensor:
    return torch.rand(T, 2, generator=torch.Generator().manual_seed(layer or 0)) > 0.4


class ScriptedModel:
    device = torch.device("cpu")
    micro_batches_per_step = 2

    def __init__(self, sites: Sequence[ScriptedSite], groups: Groups, replica: int = 0) -> None:
        self.sites, self.groups, self.replica = sites, groups, replica

    def token_layout(self, micro_batch: MicroBatch) -> Tensor:
        return micro_batch.sample_ids

    def routed_layout(self, micro_batch: MicroBatch) -> Tensor:
        return micro_batch.sample_ids.reshape(-1)[local_tokens(self.replica)]

    def forward(self, micro_batches: Sequence[MicroBatch], begin: Callable[[int], None]) -> None:
        for index in range(len(micro_batches)):
            begin(index)
            for site in self.sites:
                site.run(index)

    def release(self) -> None: ...

    def describe(self) -> dict[str, Any]:
        return {}


def batch() -> MicroBatch:
    return MicroBatch(torch.zeros_like(SAMPLE_IDS), (SAMPLE_IDS >= 0).long(), SAMPLE_IDS)


def score(model: ScriptedModel, baseline: str = "closed_form", num_steps: int = 1, num_here: int = 1) -> Any:
    """Score two micro-batches per step; a rank with num_here < num_steps has nothing to run in the later steps."""
    return score_model(
        model,
        Pass(num_steps, lambda step: [batch(), batch()] if step < num_here else [], 2, lambda _step: 2),
        estimator=EstimatorConfig(baseline=baseline, num_directions=16),
        placement=PlacementConfig(),
        info=INFO,
    )


def sharded(rank: int) -> dict[str, Any]:
    """Run all checks of one rank in one process start."""
    groups = Groups(features={"tp": dist.group.WORLD})
    found: dict[str, Any] = {}
    for baseline in BASELINES:
        sites = [ScriptedSite(0, kind, rank, 2) for kind in KINDS]
        found[baseline] = score(ScriptedModel(sites, groups), baseline)
    for num_layers in (1, 4):
        sites = [ScriptedSite(layer, kind, rank, 2) for layer in range(num_layers) for kind in KINDS]
        found[f"layers {num_layers}"] = score(ScriptedModel(sites, groups)).timing["num_collectives"]
    for num_layers in (1, 4):
        experts = [ExpertSite(layer, rank, rank, True) for layer in range(num_layers)]
        scores = score(ScriptedModel(experts, Groups(routing=dist.group.WORLD), rank))
        found[f"experts {num_layers}"] = scores
    # Without a routing group nothing is exchanged, and replicas may run different numbers of steps.
    local = [ExpertSite(0, expert, rank, False) for expert in range(2)]
    found["replicas"] = score(ScriptedModel(local, Groups(), rank), num_steps=2, num_here=2 - rank)
    # Copies of the same weights share the baselines' work.
    copies = Groups(copies={"tp": (rank, 2)})
    found["copies"] = score(ScriptedModel([ScriptedSite(layer, "replicated", 0, 1) for layer in range(3)], copies))
    with pytest.raises(LayoutError, match=r"'layers\.0\.row' is on pipeline stages 0 and 1"):
        Reducer(Groups(stage=str(rank))).merge_projections(ScriptedSite(0, "row", 0, 1).projections)
    return found


@pytest.fixture(scope="module")
def both_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, sharded, timeout_s=120)


def expected_gain(gains: Sequence[Tensor], ids: Sequence[Tensor]) -> float:
    flat, owner = torch.cat(list(gains)), torch.cat(list(ids))
    return float(flat[owner >= 0].mean())


@pytest.mark.slow
def test_every_rank_returns_the_same_scores(both_ranks: list[dict[str, Any]]) -> None:
    for name in (*BASELINES, "experts 4", "replicas", "copies"):
        first, second = (found[name].model_dump(exclude={"timing"}) for found in both_ranks)
        assert first == second, name


@pytest.mark.slow
@pytest.mark.parametrize("baseline", BASELINES)
def test_feature_and_token_shards_equal_one_process(both_ranks: list[dict[str, Any]], baseline: str) -> None:
    scores = both_ranks[0][baseline]
    assert len(scores.modules) == len(KINDS)
    ids = SAMPLE_IDS.reshape(-1)
    for module in scores.modules:
        site = ScriptedSite(0, module.type, 0, 1)
        assert module.num_tokens == 18
        assert module.gain == pytest.approx(expected_gain([site.gains(0), site.gains(1)], [ids, ids]), rel=1e-5)
        assert (module.baseline, module.baseline_stderr) == pytest.approx(one_process(site, baseline), rel=2e-5)


def one_process(site: ScriptedSite, baseline: str) -> tuple[float, float]:
    weight = site.weight_OI.double()
    x_K = (norms.directions(0, site.projections[0].fqn, 16, 8).double() @ weight.T).square().sum(dim=1)
    weight_sq = float(weight.square().sum())
    found = {
        "control_variate": lambda: norms.control_variate(x_K, weight_sq, 8),
        "gaussian": lambda: norms.gaussian(x_K),
        "closed_form": lambda: norms.closed_form(weight_sq, 8),
        "exact": lambda: norms.exact(weight.T @ weight, 8),
    }[baseline]()
    return found.value, found.stderr


@pytest.mark.slow
def test_collectives_do_not_grow_with_the_modules(both_ranks: list[dict[str, Any]]) -> None:
    for found in both_ranks:
        assert found["layers 1"] == found["layers 4"]
        one, four = (found[f"experts {count}"].timing["num_collectives"] for count in (1, 4))
        assert one == four


@pytest.mark.slow
def test_routed_tokens_of_unequal_ranks_reach_the_right_samples(both_ranks: list[dict[str, Any]]) -> None:
    scores = both_ranks[0]["experts 1"]
    ids = SAMPLE_IDS.reshape(-1)
    for expert in range(2):
        site = ExpertSite(0, expert, 0, True)
        chosen = routing_map(0)[:, expert] & (ids >= 0)
        module = next(module for module in scores.modules if module.fqn == site.projections[0].fqn)
        gains = torch.cat([site.gains(0)[chosen], site.gains(1)[chosen]])
        assert module.num_tokens == len(gains) > 0
        assert module.gain == pytest.approx(float(gains.mean()), rel=1e-5)
        row = scores.samples.fqns.index(module.fqn)
        assert scores.samples.num_tokens[row].tolist() == [2 * int((chosen & (ids == s)).sum()) for s in (0, 1)]


@pytest.mark.slow
def test_without_a_routing_group_no_token_crosses_ranks(both_ranks: list[dict[str, Any]]) -> None:
    scores = both_ranks[0]["replicas"]
    ids = SAMPLE_IDS.reshape(-1)
    for expert in range(2):
        fqn = ExpertSite(0, expert, 0, False).projections[0].fqn
        module = next(module for module in scores.modules if module.fqn == fqn)
        chosen = routing_map(0)[:, expert] & (ids >= 0)
        # rank 0 runs two steps, rank 1 one; two micro-batches in each
        counts = [int(chosen[local_tokens(rank)].sum()) * 2 * (2 - rank) for rank in range(2)]
        assert module.num_tokens == sum(counts)


@pytest.mark.slow
def test_copies_share_baselines_and_lose_none(both_ranks: list[dict[str, Any]]) -> None:
    for module in both_ranks[0]["copies"].modules:
        weight = ScriptedSite(module.layer, "replicated", 0, 1).weight_OI
        assert module.baseline == pytest.approx(float(weight.norm()) / 8**0.5, rel=1e-6)
