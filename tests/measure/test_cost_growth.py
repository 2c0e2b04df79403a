"""Scoring twice as many modules, or samples, does twice the work: counted in calls, so that no machine's mood shows."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from plop_dist.backends.hf.whole import whole_model
from plop_dist.config.schema import EstimatorConfig, PlacementConfig
from plop_dist.data.samples import collate
from plop_dist.measure.collectives import Reducer
from plop_dist.measure.protocols import Groups, ScorableModel
from plop_dist.measure.run import Pass, score_model
from plop_dist.rundir.progress import ProgressLog
from tests.measure.test_collect_ranks import ShardedSite
from tests.models import random_tokens, tiny

EXPERTS = {"num_experts": 24, "num_experts_per_tok": 4, "hidden_size": 16, "moe_intermediate_size": 8}


def num_calls(work: Callable[[], Any]) -> int:
    """Return how many functions, of Python or C, are called, each resumption of a generator among them."""
    profile = cProfile.Profile()
    profile.enable()
    work()
    profile.disable()
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def model_of(num_layers: int) -> ScorableModel:
    module = tiny("qwen3_moe", num_hidden_layers=num_layers, **EXPERTS)
    return whole_model(module, with_head=False)


def score(model: ScorableModel, num_samples: int, log: ProgressLog, *, stop: bool = False) -> None:
    samples = random_tokens(num_samples, 5).tolist()
    pairs = [[start, start + 1] for start in range(0, num_samples, 2)]
    score_model(
        model,
        Pass(
            num_steps=len(pairs),
            micro_batches=lambda step: [collate(samples, pairs[step], num_rows=2, length=5, pad_id=0, side="right")],
            num_samples=num_samples,
            samples_after=lambda step: 2 * (step + 1),
            log=log,
        ),
        estimator=EstimatorConfig(num_directions=2, stop_when_stable=stop),
        placement=PlacementConfig(),
        info={"model": {"name_or_path": "tiny"}, "data": {"source": "random"}, "parallel": {}},
    )


def grows_linearly(counts: list[int]) -> None:
    """Check three counts, of 1, 2 and 4 times as much: the second step costs no more than twice the first."""
    first, second = counts[1] - counts[0], counts[2] - counts[1]
    assert 0 < second <= 2.1 * first, counts


@pytest.mark.slow
def test_calls_grow_with_modules(tmp_path: Path) -> None:
    models = {number: model_of(number) for number in (2, 4, 8)}
    score(models[2], 2, ProgressLog(None, "warm", 0))
    grows_linearly([num_calls(lambda n=n: score(models[n], 4, ProgressLog(tmp_path, f"{n}", 0))) for n in models])


@pytest.mark.slow
def test_calls_grow_with_samples(tmp_path: Path) -> None:
    model = model_of(1)
    score(model, 2, ProgressLog(None, "warm", 0))
    grows_linearly([num_calls(lambda n=n: score(model, n, ProgressLog(tmp_path, f"{n}", 0))) for n in (16, 32, 64)])


def test_a_choice_is_looked_at_again_once_there_are_a_few_percent_more_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []

    def never(modules: Any, samples: Any, choose: Any) -> float:
        looked_at.append(len(samples.sample_ids))
        return 0.0

    monkeypatch.setattr("plop_dist.measure.run.selection_confidence", never)
    score(model_of(1), 120, ProgressLog(None, "", 0), stop=True)
    assert looked_at[:19] == [*range(16, 54, 2)]  # after every step while that adds enough
    steps = [after / before for before, after in pairwise(looked_at[18:])]
    assert all(1.04 <= step < 1.04 + 2 / 52 for step in steps), looked_at
    assert looked_at[-1] > 110


def test_of_ranks_that_hold_the_same_modules_one_sends_their_names() -> None:
    sent: list[Any] = []

    class Alone(Reducer):
        def gather_objects(self, value: Any, what: str) -> list[Any]:
            sent.append(value)
            return [("0", (site.projections[0],))]

    site = ShardedSite("whole", 1, 0)
    for replica in (0, 1):
        found = Alone(Groups(copies={"tp": (replica, 2)})).merge_projections([site])
        assert found == site.projections
    assert sent == [("0", site.projections), ("0", ())]
