"""The sums of gains in one process: against float64 brute force, however samples are padded, packed or split."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from plop_dist.backends.hf_model import HFModel
from plop_dist.backends.transformers import whole_sites
from plop_dist.collect import Collector
from plop_dist.config import EstimatorConfig, PlacementConfig
from plop_dist.data import collate
from plop_dist.errors import ModelError, WorkerError
from plop_dist.protocols import MicroBatch
from plop_dist.scoring import Pass, score_model
from plop_dist.types import SampleTotals
from tests.models import random_tokens, tiny
from tests.reference import assert_totals, brute_force, inputs_of, weights_of

LENGTHS = (9, 3, 6, 1)
SAMPLES = [random_tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]
FAMILIES = ("llama", "qwen2", "gpt2")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny(request.param)


def wrap(model: nn.Module) -> HFModel:
    return HFModel(model, whole_sites(model, with_head=True), with_head=True)


def padded(indices: Sequence[int], side: str, samples: Sequence[Sequence[int]] = SAMPLES) -> MicroBatch:
    length = max(len(samples[index]) for index in indices)
    return collate(samples, indices, num_rows=len(indices) + 1, length=length, pad_id=0, side=side)


def collect(model: nn.Module, *micro_batches: MicroBatch) -> SampleTotals:
    collector = Collector(wrap(model))
    with collector.attached():
        return collector.step(micro_batches)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_brute_force(model: nn.Module, side: str) -> None:
    assert_totals(collect(model, padded([0, 1, 2, 3], side)), brute_force(model, SAMPLES))
    assert_totals(collect(model, padded([3, 1], side), padded([0, 2], side)), brute_force(model, SAMPLES))


def test_packed_rows_with_position_ids_equal_brute_force(model: nn.Module) -> None:
    ids = torch.tensor([token for sample in SAMPLES for token in sample])[None]
    owner = torch.tensor([index for index, sample in enumerate(SAMPLES) for _ in sample])[None]
    positions = torch.tensor([position for sample in SAMPLES for position in range(len(sample))])[None]
    # transformers finds the borders between packed samples in position_ids where no mask is given.
    packed = MicroBatch(ids, torch.ones_like(ids), owner, positions, extra={"attention_mask": None})
    assert_totals(collect(model, packed), brute_force(model, SAMPLES))


def test_outputs_are_bit_identical_before_during_and_after(model: nn.Module) -> None:
    tokens = random_tokens(2, 7)
    with torch.no_grad():
        before = model(tokens).logits
        collector = Collector(wrap(model))
        with collector.attached():
            collector.step([padded([0, 1], "right")])
            collector._begin(0)
            during = model(tokens).logits
        after = model(tokens).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert hooks(model) == 0


class Odd(nn.Module):
    """Linear maps used as the families do not: twice, on strided input, per head, on flattened tokens."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding(128, 12)
            self.twice = nn.Linear(12, 12)
            self.strided = nn.Linear(12, 5, bias=False)
            self.per_head = nn.Linear(3, 4)
            self.heads_first = nn.Linear(3, 2)
            self.flat = nn.Linear(12, 3)
            self.flat_heads = nn.Linear(3, 7)
            self.changed_in_place = nn.Linear(12, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        batch, length, _ = x.shape
        y = self.twice(torch.tanh(self.twice(x)))
        self.strided(x.transpose(1, 2).contiguous().transpose(1, 2))
        self.per_head(y.view(batch, length, 4, 3))
        self.heads_first(y.view(batch, length, 4, 3).transpose(1, 2))
        self.flat(x.reshape(-1, 12))
        self.flat_heads(y.reshape(-1, 4, 3))
        self.strided(x)
        self.changed_in_place(x.mul_(3))
        return y


def test_twice_called_strided_and_four_dimensional_inputs_equal_brute_force() -> None:
    model = Odd()
    totals = collect(model, padded([0, 1, 2, 3], "left"))
    assert_totals(totals, brute_force(model, SAMPLES))
    count = dict(zip(totals.fqns, totals.num_tokens.sum(axis=1).tolist(), strict=True))
    assert count == {"twice": 38, "strided": 38, "per_head": 76, "heads_first": 76, "flat": 19, "flat_heads": 76,
                     "changed_in_place": 19}  # fmt: skip


def test_zero_and_non_finite_tokens_are_skipped_and_counted() -> None:
    model = Odd()
    with torch.no_grad():
        model.embed.weight[SAMPLES[0][2]] = 0
        model.embed.weight[SAMPLES[0][4]] = torch.inf
        model.embed.weight[SAMPLES[2][0], 3] = torch.nan
    samples = [list(dict.fromkeys(sample)) for sample in SAMPLES]
    totals = collect(model, padded([0, 1, 2, 3], "right", samples))
    expected = brute_force(model, samples)
    assert_totals(totals, expected)
    skipped = totals.num_skipped[totals.fqns.index("strided")]
    assert skipped[0] >= 2
    assert skipped[2] >= 1
    # tanh maps an infinite embedding's image to finite values, so the second call has a gain again
    assert totals.num_skipped[totals.fqns.index("twice"), 0] < 2 * skipped[0]


def test_a_shape_that_is_not_the_batch_is_an_error_that_names_the_module() -> None:
    class Pooled(Odd):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.flat(self.embed(input_ids)[:, ::2])

    with pytest.raises(ModelError, match=r"'flat' saw activations of leading shape \(3, 5\).*3 x 9 tokens"):
        collect(Pooled(), padded([0, 1], "right"))


def test_hooks_are_gone_after_an_error_and_the_module_is_named() -> None:
    model = tiny("llama")
    tokens = random_tokens(1, 4)
    with torch.no_grad():
        before = model(tokens).logits
    down = model.model.layers[1].mlp.down_proj
    down.forward = lambda z: (_ for _ in ()).throw(RuntimeError("no memory"))
    run = Pass(1, lambda _step: [padded([0], "right")], 1, lambda _step: 1)
    info = {"model": {"name_or_path": "tiny"}, "data": {}, "parallel": {}}
    with pytest.raises(
        WorkerError,
        match=r"rank 0: scoring step 1 of 1 failed after module 'model\.layers\.1\.mlp\.up_proj'.*no memory",
    ):
        score_model(wrap(model), run, estimator=EstimatorConfig(), placement=PlacementConfig(), info=info)
    del down.forward
    assert hooks(model) == 0
    with torch.no_grad():
        assert torch.equal(before, model(tokens).logits)


def test_inside_inference_mode() -> None:
    model = tiny("llama")
    with torch.inference_mode():
        totals = collect(model, padded([0, 1], "right"))
    assert_totals(totals, brute_force(model, SAMPLES[:2]))


# -- wrong formulas must be visibly wrong on this data ----------------------------------------------------------------


def largest_error(model: nn.Module, wrong: dict[str, float]) -> float:
    truth = {fqn: float(torch.cat(gains).mean()) for fqn, gains in brute_force(model, SAMPLES).items()}
    return max(abs(wrong[fqn] / truth[fqn] - 1) for fqn in truth)


def all_inputs(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return z (T, I) over all samples and weight (O, I) by projection."""
    inputs = [inputs_of(model, sample) for sample in SAMPLES]
    return {
        fqn: (torch.cat([seen[holder] for seen in inputs]), weight)
        for fqn, (holder, weight) in weights_of(model).items()
    }


def test_counting_padding_would_show() -> None:
    model = tiny("llama")
    right = padded([0, 1, 2, 3], "right")
    everything = MicroBatch(right.input_ids, right.attention_mask, right.sample_ids * 0, right.position_ids)
    totals = collect(model, everything)
    wrong = totals.gain_total.sum(axis=1) / totals.num_tokens.sum(axis=1)
    assert largest_error(model, dict(zip(totals.fqns, wrong.tolist(), strict=True))) > 0.02


def test_the_root_before_the_sum_over_shards_would_show() -> None:
    model = tiny("llama")
    wrong = {
        fqn: float((sum((z @ part.T).norm(dim=1) for part in weight.chunk(2)) / z.norm(dim=1)).mean())
        for fqn, (z, weight) in all_inputs(model).items()
    }
    assert largest_error(model, wrong) > 0.2


def test_the_sum_of_row_parallel_partial_squares_would_show() -> None:
    model = tiny("llama")
    wrong = {}
    for fqn, (z, weight) in all_inputs(model).items():
        shards = zip(z.chunk(2, dim=1), weight.chunk(2, dim=1), strict=True)
        squares = sum((z_r @ w_r.T).square().sum(dim=1) for z_r, w_r in shards)
        wrong[fqn] = float((torch.as_tensor(squares).sqrt() / z.norm(dim=1)).mean())
    assert largest_error(model, wrong) > 0.05


def test_the_ratio_of_averaged_norms_would_show() -> None:
    model = tiny("llama")
    wrong = {
        fqn: float((z @ weight.T).norm(dim=1).mean() / z.norm(dim=1).mean())
        for fqn, (z, weight) in all_inputs(model).items()
    }
    assert largest_error(model, wrong) > 0.01
