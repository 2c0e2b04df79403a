"""Scoring from end to end: two ranks give the scores of one, and a failure names rank, step and module."""

# T tokens, I in_features, O out_features, E experts

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import plop_dist
from plop_dist.backends.hf.model import HFModel
from plop_dist.backends.hf.whole import whole_sites
from plop_dist.config.schema import EstimatorConfig, PlacementConfig
from plop_dist.errors import LayoutError, ModelError, WorkerError
from plop_dist.measure import norms
from plop_dist.measure.collectives import Reducer
from plop_dist.measure.protocols import Groups, LocalWeight, MicroBatch, Part, Recorder, Routing
from plop_dist.measure.run import Pass, score_model
from plop_dist.measure.weight import Weight
from plop_dist.values.scores import Projection, Scores
from tests.models import tiny
from tests.spawn import run_ranks

BATCH, LENGTH = 2, 6
SAMPLE_IDS = torch.tensor([[0, 0, 0, 0, -1, -1], [1, 1, 1, 1, 1, -1]])
T = BATCH * LENGTH
KINDS = ("column", "row", "sequence_column", "sequence_row", "replicated")


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
        self.kind, self.rank, self.size, self.group, self.holder = kind, rank, size, "tp", None
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
            local = LocalWeight(projection, Weight.of(self.weight_OI.chunk(self.size)[self.rank]), True)
        elif self.kind.endswith("row"):
            columns = torch.arange(8).chunk(self.size)[self.rank]
            local = LocalWeight(projection, Weight.of(self.weight_OI[:, columns]), True, columns)
        else:
            local = LocalWeight(projection, Weight.of(self.weight_OI))
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


class RoutedSite(ScriptedSite):
    """An expert of which this rank holds a copy; it sees its own replica's tokens only."""

    def __init__(self, expert: int, replica: int) -> None:
        super().__init__(0, f"experts.{expert}.up", 0, 1)
        self.group, self.expert, self.replica = "etp", expert, replica

    def run(self, micro_batch: int) -> None:
        assert self.recorder is not None
        own = local_tokens(self.replica)
        map_TE = routing_map()[own]
        self.recorder.record_routing("router", map_TE)
        z_TI = draw(f"{self.projections[0].fqn}.{micro_batch}", T, 8)[own][map_TE[:, self.expert]]
        out_sq_T = norms.local_sq_norm(z_TI @ self.weight_OI.T)
        self.recorder.record(self, norms.local_sq_norm(z_TI), [out_sq_T], routing=Routing("router", self.expert))


def local_tokens(replica: int) -> Tensor:
    """Replica 0 routes 7 of the 12 tokens, replica 1 the other 5."""
    return torch.arange(7) if replica == 0 else torch.arange(7, T)


def routing_map() -> Tensor:
    return torch.rand(T, 2, generator=torch.Generator().manual_seed(0)) > 0.4


class ScriptedModel:
    device = torch.device("cpu")
    micro_batches_per_step = 2

    def __init__(self, sites: Sequence[ScriptedSite], groups: Groups, replica: int = 0) -> None:
        self.sites, self.groups, self.replica = sites, groups, replica

    def check(self, micro_batch: MicroBatch) -> None:
        """Any will do."""

    def token_layout(self, micro_batch: MicroBatch) -> Tensor:
        return micro_batch.sample_ids

    def routed_layout(self, micro_batch: MicroBatch) -> Tensor:
        return micro_batch.sample_ids.reshape(-1)[local_tokens(self.replica)]

    def forward(self, micro_batches: Sequence[MicroBatch], begin: Callable[[int], None]) -> None:
        for index in range(len(micro_batches)):
            begin(index)
            for site in self.sites:
                site.run(index)

    def watching(self) -> AbstractContextManager[Sequence[Projection]]:
        return nullcontext(())

    def release(self) -> None: ...

    def describe(self) -> dict[str, Any]:
        return {}


def batch() -> MicroBatch:
    return MicroBatch(torch.zeros_like(SAMPLE_IDS), (SAMPLE_IDS >= 0).long(), SAMPLE_IDS)


def score(model: Any, num_steps: int = 1, num_here: int = 1) -> Scores:
    """Score two micro-batches per step; a rank with num_here < num_steps has nothing to run in the later steps."""
    return score_model(
        model,
        Pass(num_steps, lambda step: [batch(), batch()] if step < num_here else [], 2, lambda _step: 2),
        estimator=EstimatorConfig(baseline="exact"),
        placement=PlacementConfig(),
        info={"model": {"name_or_path": "scripted"}, "data": {}, "parallel": {}},
    )


def on_a_rank(rank: int) -> dict[str, Scores]:
    """Run all checks of one rank in one process start."""
    found = {}
    sites = [ScriptedSite(layer, kind, rank, 2) for layer in range(2) for kind in KINDS]
    found["shards"] = score(ScriptedModel(sites, Groups(features={"tp": dist.group.WORLD})))
    # Without a routing group nothing is exchanged, so that replicas may run different numbers of steps.
    experts = [RoutedSite(expert, rank) for expert in range(2)]
    found["replicas"] = score(ScriptedModel(experts, Groups(), rank), num_steps=2, num_here=2 - rank)
    # Ranks with copies of the same weights share the baselines' work.
    copies = [ScriptedSite(layer, "replicated", 0, 1) for layer in range(3)]
    found["copies"] = score(ScriptedModel(copies, Groups(copies={"tp": (rank, 2)})))
    with pytest.raises(LayoutError, match=r"'layers\.0\.row' is on pipeline stages 0 and 1"):
        Reducer(Groups(stage=str(rank))).merge_projections([ScriptedSite(0, "row", 0, 1)])
    return found


@pytest.mark.slow
def test_two_ranks_give_the_scores_of_one() -> None:
    first, second = run_ranks(2, on_a_rank, timeout_s=120)
    for name in first:
        assert first[name].model_dump(exclude={"timing"}) == second[name].model_dump(exclude={"timing"}), name
        assert first[name].samples == second[name].samples

    ids_T = SAMPLE_IDS.reshape(-1)
    assert len(first["shards"].modules) == 2 * len(KINDS)
    for module in first["shards"].modules:
        site = ScriptedSite(module.layer or 0, module.type, 0, 1)
        gains = torch.cat([site.gains(0)[ids_T >= 0], site.gains(1)[ids_T >= 0]])
        weight = site.weight_OI.double()
        assert module.num_tokens == len(gains) == 18
        assert module.gain == pytest.approx(float(gains.mean()), rel=1e-5)
        assert module.baseline == pytest.approx(norms.exact(weight @ weight.T, 8).value, rel=1e-5)

    for expert, module in enumerate(first["replicas"].modules):
        counted = routing_map()[:, expert] & (ids_T >= 0)
        # rank 0 runs two steps and rank 1 one, of two micro-batches each
        assert module.num_tokens == sum(2 * (2 - rank) * int(counted[local_tokens(rank)].sum()) for rank in range(2))

    for module in first["copies"].modules:
        weight = ScriptedSite(module.layer or 0, "replicated", 0, 1).weight_OI.double()
        assert module.baseline == pytest.approx(norms.exact(weight @ weight.T, 8).value, rel=1e-5)


# -- one process --------------------------------------------------------------------------------------------------


def test_a_failing_forward_names_rank_step_and_module() -> None:
    model = tiny("llama")
    wrapped = HFModel(model, whole_sites(model, with_head=False), knows_padding=True)

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(fail)
    message = r"rank 0: scoring step 1 of 1 failed after module 'model\.layers\.1\.mlp\.up_proj': .*no memory"
    with pytest.raises(WorkerError, match=message):
        score(wrapped)


def test_what_a_model_says_of_its_inputs_behind_other_modules_is_the_users_to_mend() -> None:
    model = tiny("llama")
    wrapped = HFModel(model, whole_sites(model, with_head=False), knows_padding=True)
    own = model.model.layers[1].forward

    def ask_for_more(*args: Any, **kwargs: Any) -> Any:
        own(*args, **kwargs)
        raise ValueError("which tokens are images?")

    model.model.layers[1].forward = ask_for_more
    message = r"as they are \(step 1, after module 'model\.layers\.1\..*ValueError: which tokens are images\?.*keys"
    with pytest.raises(ModelError, match=message):
        score(wrapped)


def test_what_our_own_hooks_raise_is_not() -> None:
    model = tiny("llama")
    sites: list[Any] = whole_sites(model, with_head=False)
    sites[-1]._record = partial(sites[-1]._record, leading=0)
    with pytest.raises(WorkerError, match=r"failed after module .*TypeError"):
        score(HFModel(model, sites, knows_padding=True))


def test_a_place_without_an_embedding_is_the_users_to_mend() -> None:
    with pytest.raises(ModelError, match=r"as they are: IndexError: index out of range"):
        plop_dist.score(tiny("gpt2", n_positions=16), [{"input_ids": torch.ones(1, 20, dtype=torch.int64)}])


class InPlace(nn.Module):
    """Two linears read the same tensor, which changes in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(draw("embedding", 4, 8))
        self.before = nn.Linear(8, 6, bias=False)
        self.after = nn.Linear(8, 6, bias=False)
        self.after.weight = self.before.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        z = self.embedding(input_ids)
        self.before(z)
        z *= 3
        self.after(z)


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
def test_an_input_changed_in_place_is_read_again(mode: Callable[[], Any]) -> None:
    model = InPlace()
    with mode():
        before, after = score(HFModel(model, whole_sites(model, with_head=False), knows_padding=True)).modules[::-1]
    assert before.num_tokens == after.num_tokens == 18
    assert before.gain == pytest.approx(after.gain, rel=1e-6)  # a gain does not depend on its token's scale
