"""Gains of one process equal float64 brute force, however samples are padded, packed and batched."""

# T tokens, I in_features, O out_features, M modules, S samples

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plop_dist.backends.hf.model import HFModel
from plop_dist.backends.hf.whole import whole_sites
from plop_dist.data.samples import collate, plan_steps, step_micro_batches
from plop_dist.measure.aggregate import score_modules
from plop_dist.measure.collector import Collector
from plop_dist.measure.norms import Baseline
from plop_dist.measure.protocols import MicroBatch
from plop_dist.measure.sums import add_totals
from plop_dist.values.sample_totals import SampleTotals
from tests.models import random_tokens, tiny
from tests.reference import Truth, brute_force

LENGTHS = (5, 11, 3, 1, 9, 11, 2)
SAMPLES = [random_tokens(1, length, seed=length * 7 + place)[0].tolist() for place, length in enumerate(LENGTHS)]
FAMILIES = ("llama", "qwen2", "gpt2")


@pytest.fixture(scope="module", params=FAMILIES)
def known(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, list[Truth]]]:
    model = tiny(request.param)
    return model, brute_force(model, SAMPLES)


def wrapped(model: nn.Module, call: Callable[..., Any] | None = None) -> HFModel:
    return HFModel(model, whole_sites(model, True), call=call, with_head=True, knows_padding=True)


def collect(model: nn.Module, steps: Sequence[Sequence[MicroBatch]]) -> SampleTotals:
    collector = Collector(wrapped(model))
    with collector.attached():
        return add_totals([collector.step(step) for step in steps], collector.owned)


def padded_steps(side: str, batch_size: int, per_step: int) -> list[list[MicroBatch]]:
    plan = plan_steps([len(s) for s in SAMPLES], batch_size, 1, per_step, uniform=True, in_order=False)
    return [step_micro_batches(SAMPLES, step, 0, pad_id=0, side=side) for step in plan]


def check(totals: SampleTotals, truth: dict[str, list[Truth]], rtol: float = 1e-5) -> None:
    assert set(totals.fqns) == set(truth)
    assert totals.sample_ids.tolist() == list(range(len(SAMPLES)))
    for row, fqn in enumerate(totals.fqns):
        expected_S = [float(part.gains.sum()) for part in truth[fqn]]
        np.testing.assert_allclose(totals.gain_total[row], expected_S, rtol=rtol, err_msg=fqn)
        assert totals.num_tokens[row].tolist() == list(LENGTHS), fqn
        assert totals.num_skipped[row].sum() == 0


@pytest.mark.parametrize(("side", "batch_size", "per_step"), [("right", 7, 1), ("left", 3, 2), ("left", 1, 1)])
def test_gains_do_not_depend_on_padding_or_batches(
    known: tuple[nn.Module, dict[str, list[Truth]]], side: str, batch_size: int, per_step: int
) -> None:
    model, truth = known
    check(collect(model, padded_steps(side, batch_size, per_step)), truth)


def test_packed_rows_keep_samples_apart(known: tuple[nn.Module, dict[str, list[Truth]]]) -> None:
    model, truth = known
    rows = [(0, 2, 4), (1, 3, 6), (5,)]
    steps = []
    for row in rows:
        ids = torch.tensor([[token for sample in row for token in SAMPLES[sample]]])
        owner = torch.tensor([[sample for sample in row for _ in SAMPLES[sample]]])
        positions = torch.tensor([[place for sample in row for place in range(LENGTHS[sample])]])
        # Positions that start again are how transformers tells packed samples apart, where there is no mask.
        steps.append([MicroBatch(ids, torch.ones_like(ids), owner, positions, {"attention_mask": None})])
    check(collect(model, steps), truth)


def test_outputs_are_bit_identical_and_hooks_are_gone() -> None:
    model = tiny("llama")
    seen: list[Tensor] = []

    def call(input_ids: Tensor, attention_mask: Tensor, use_cache: bool = True) -> None:
        seen.append(model(input_ids, attention_mask=attention_mask, use_cache=use_cache).logits)

    (step,) = padded_steps("right", 7, 1)
    before = num_hooks(model)
    with torch.no_grad():
        call(step[0].input_ids, step[0].attention_mask, False)
    collector = Collector(wrapped(model, call))
    with collector.attached():
        assert num_hooks(model) > before
        collector.step(step)
    assert num_hooks(model) == before
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])


def num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_gone_after_an_error() -> None:
    model = tiny("llama")
    (step,) = padded_steps("right", 7, 1)
    before = num_hooks(model)
    truth = collect(model, [step])
    collector = Collector(wrapped(model))
    broken = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError), collector.attached():
        collector.step(step)
    broken.remove()
    assert num_hooks(model) == before
    assert collector.last_site == "model.layers.1.mlp.up_proj"
    with collector.attached():  # and it works again, without a trace of the pass that failed
        assert collector.step(step) == truth


def fail(module: nn.Module, args: Any) -> None:
    raise ZeroDivisionError


class Odd(nn.Module):
    """Linears as awkward as a host model's: called twice, on strided input, per head in two layouts, on flat tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, 12)
        self.twice = nn.Linear(12, 12)
        self.strided = nn.Linear(12, 5, bias=False)
        self.per_head = nn.Linear(4, 6)
        self.heads_first = nn.Linear(4, 6)
        self.flat = nn.Linear(12, 3)
        self.flat_heads = nn.Linear(4, 2)
        self.by_name = nn.Linear(12, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        z = self.embedding(input_ids)
        batch, length, _ = z.shape
        heads = z.view(batch, length, 3, 4)
        self.strided(z.transpose(0, 1).contiguous().transpose(0, 1))
        self.per_head(heads)
        self.heads_first(heads.transpose(1, 2))
        self.flat(z.view(batch * length, 12))
        self.flat_heads(heads.reshape(batch * length, 3, 4))
        self.by_name(input=z)
        self.twice(self.twice(z))


def odd_batch() -> MicroBatch:
    return collate([[3, 4, 5, 6, 7], [8, 9, 10, 11]], [0, 1], num_rows=3, length=5, pad_id=0, side="left")


def mean_gain(weight_OI: Tensor, z_TI: Tensor) -> float:
    z_TI, weight_OI = z_TI.detach().double(), weight_OI.detach().double()
    return float(((z_TI @ weight_OI.T).norm(dim=1) / z_TI.norm(dim=1)).mean())


def test_twice_called_strided_and_per_head_inputs() -> None:
    model = Odd()
    totals = collect(model, [[odd_batch()]])
    tokens = torch.tensor([3, 4, 5, 6, 7, 8, 9, 10, 11])
    with torch.no_grad():
        z_TI = model.embedding(tokens)
        heads_TI = z_TI.view(-1, 4)
        second_TI = model.twice(z_TI)
        expected = {
            "twice": (mean_gain(model.twice.weight, torch.cat([z_TI, second_TI])), 2),
            "strided": (mean_gain(model.strided.weight, z_TI), 1),
            "per_head": (mean_gain(model.per_head.weight, heads_TI), 3),
            "heads_first": (mean_gain(model.heads_first.weight, heads_TI), 3),
            "flat": (mean_gain(model.flat.weight, z_TI), 1),
            "flat_heads": (mean_gain(model.flat_heads.weight, heads_TI), 3),
            "by_name": (mean_gain(model.by_name.weight, z_TI), 1),
        }
    for row, fqn in enumerate(totals.fqns):
        gain, times = expected[fqn]
        assert totals.num_tokens[row].tolist() == [5 * times, 4 * times], fqn
        assert totals.gain_total[row].sum() / totals.num_tokens[row].sum() == pytest.approx(gain, rel=1e-5), fqn


def test_a_module_once_fed_other_things_than_tokens_gets_no_score() -> None:
    class Pooled(Odd):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> None:
            z = self.embedding(input_ids)
            self.strided(z)
            if len(z) == 3:
                self.strided(z.mean(dim=1))
            self.flat(z.view(-1, 12))

    one_row = collate([[], [], [3, 4, 5]], [2], num_rows=1, length=3, pad_id=0, side="left")
    totals = collect(Pooled(), [[odd_batch()], [one_row]]).observed()
    row, other = totals.fqns.index("strided"), totals.fqns.index("flat")
    assert np.isnan(totals.gain_total[row].sum())
    assert np.isfinite(totals.gain_total[other]).all()
    assert totals.num_tokens[other].tolist() == [5, 4, 3]
    projections = [projection for site in whole_sites(Pooled(), True) for projection in site.projections]
    known = [projection for projection in projections if projection.fqn in ("strided", "flat")]
    scored, left_out = score_modules(
        known, totals.select(p.fqn for p in known), {p.fqn: Baseline(1.0, 0.0) for p in known}
    )
    assert [module.fqn for module in scored] == ["flat"]
    assert [(entry.fqn, entry.reason) for entry in left_out] == [("strided", "not_per_token")]


def test_zero_and_non_finite_tokens_are_left_out_and_counted() -> None:
    model = Odd()
    with torch.no_grad():
        model.embedding.weight[3] = 0  # sample 0
        model.embedding.weight[8] = float("inf")  # sample 1
        model.embedding.weight[9, 0] = float("nan")  # sample 1
        model.embedding.weight[0] = float("nan")  # padding: neither counted nor skipped
        totals = collect(model, [[odd_batch()]])
        row = totals.fqns.index("strided")
        assert totals.num_tokens[row].tolist() == [4, 2]
        assert totals.num_skipped[row].tolist() == [1, 2]
        kept = model.embedding(torch.tensor([4, 5, 6, 7, 10, 11]))
    assert np.isfinite(totals.gain_total).all()
    assert totals.gain_total[row].sum() / 6 == pytest.approx(mean_gain(model.strided.weight, kept), rel=1e-5)


def test_an_output_that_is_not_finite_is_skipped_too() -> None:
    model = Odd()
    with torch.no_grad():
        model.strided.weight[0, 0] = float("nan")
    totals = collect(model, [[odd_batch()]])
    row = totals.fqns.index("strided")
    assert totals.num_tokens[row].sum() == 0
    assert totals.num_skipped[row].tolist() == [5, 4]


def test_totals_add_up_over_steps_with_different_samples() -> None:
    first = SampleTotals(("m",), np.array([0, 2]), np.array([[1.0, 2.0]]), np.array([[1, 1]]), np.array([[0, 3]]))
    second = SampleTotals(("m",), np.array([1, 2]), np.array([[4.0, 8.0]]), np.array([[2, 5]]), np.array([[0, 1]]))
    total = add_totals([first, second], ("m",))
    assert total.sample_ids.tolist() == [0, 1, 2]
    assert total.gain_total.tolist() == [[1.0, 4.0, 10.0]]
    assert total.num_tokens.tolist() == [[1, 2, 6]]
    assert total.num_skipped.tolist() == [[0, 0, 4]]
    assert add_totals([], ("m",)).gain_total.shape == (1, 0)


# -- wrong formulas must show on this very data ----------------------------------------------------------------------


def whole(truth: dict[str, list[Truth]], fqn: str) -> tuple[Tensor, Tensor, float]:
    """Return all tokens' inputs (T, I), the weight (O, I) and the true mean gain."""
    z_TI = torch.cat([part.z_TI for part in truth[fqn]])
    weight_OI = truth[fqn][0].weight_OI
    return z_TI, weight_OI, float(torch.cat([part.gains for part in truth[fqn]]).mean())


def test_counting_padding_is_visibly_wrong(known: tuple[nn.Module, dict[str, list[Truth]]]) -> None:
    model, truth = known
    ((batch,),) = padded_steps("right", 7, 1)
    counted = batch.sample_ids.max(dim=1, keepdim=True).values.expand_as(batch.sample_ids)
    totals = collect(model, [[MicroBatch(batch.input_ids, batch.attention_mask, counted, batch.position_ids)]])
    errors = [
        abs(totals.gain_total[row].sum() / totals.num_tokens[row].sum() / whole(truth, fqn)[2] - 1)
        for row, fqn in enumerate(totals.fqns)
    ]
    assert float(np.median(errors)) > 0.01


def test_wrong_ways_to_shard_and_to_average_are_visibly_wrong(
    known: tuple[nn.Module, dict[str, list[Truth]]],
) -> None:
    _, truth = known
    errors: dict[str, list[float]] = {"root before sum": [], "row-parallel squares": [], "ratio of means": []}
    for fqn in truth:
        z_TI, weight_OI, gain = whole(truth, fqn)
        norm_T = z_TI.norm(dim=1)
        rows, columns = weight_OI.chunk(2), weight_OI.chunk(2, dim=1)
        root_first_T = sum((z_TI @ shard.T).norm(dim=1) for shard in rows)
        pairs = list(zip(z_TI.chunk(2, dim=1), columns, strict=True))
        squares_T = sum((z @ shard.T).square().sum(dim=1) for z, shard in pairs)
        wrong = {
            "root before sum": float((root_first_T / norm_T).mean()),
            "row-parallel squares": float((squares_T.sqrt() / norm_T).mean()),
            "ratio of means": float((z_TI @ weight_OI.T).norm(dim=1).mean() / norm_T.mean()),
        }
        right_T = sum((z_TI @ shard.T).square().sum(dim=1) for shard in rows).sqrt()
        assert float((right_T / norm_T).mean()) == pytest.approx(gain, rel=1e-12)
        assert float((sum(z @ shard.T for z, shard in pairs).norm(dim=1) / norm_T).mean()) == pytest.approx(gain)
        for name, value in wrong.items():
            errors[name].append(abs(value / gain - 1))
    assert np.median(errors["root before sum"]) > 0.2
    assert np.median(errors["row-parallel squares"]) > 0.02
    # Behind a norm all tokens are about as long; the inputs of o_proj and down_proj are not.
    assert max(errors["ratio of means"]) > 0.01
