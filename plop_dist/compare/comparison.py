"""The whole comparison: every arm at its best rate, from several seeds, and what the first is against each other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from plop_dist.compare.arms import Candidate, build_arms, check_arms
from plop_dist.compare.method import CHOOSING, REPORTED
from plop_dist.compare.rates import best_exponent, first_exponents, most_further, next_exponent
from plop_dist.compare.result import Comparison
from plop_dist.compare.rewards import check_rewarded
from plop_dist.compare.runs import Record, Runs
from plop_dist.compare.store import Store
from plop_dist.compare.summing_up import Trained, sum_up
from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError, WorkerError
from plop_dist.rundir.layout import RunDir
from plop_dist.training.train import check_task
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Scores

Notify = Callable[..., None]


def check(config: Config) -> None:
    """Raise ConfigError for what cannot be compared, before anything is scored."""
    if config.train.method == "none":
        raise ConfigError(
            "compare trains every arm, but train.method is none, which trains nothing; set train.method=sft or grpo."
        )
    if config.train.method == "grpo":
        check_rewarded(config)
    check_arms(config.compare.arms, config.placement)


def compare(config: Config, notify: Notify) -> Comparison:
    """Train every arm of compare.arms, and return what has come of it. Collective over all ranks.

    What was trained before in this run directory is kept. Raises UserError.
    """
    check(config)
    run_dir, options = RunDir(config.run_dir), config.compare
    scores = Scores.from_file(run_dir.scores)
    candidates = build_arms(scores, options.arms, config.placement, options.seed)
    for candidate in candidates:
        check_task(config, scores.model, candidate.placement.chosen)
    trainer = _Trainer(_with(config, eval_samples=options.held_out), notify, candidates)
    base = trainer.measure_base()
    by_placement: dict[str, Trained] = {}
    for candidate in candidates:
        key = _key(candidate.placement)
        if key not in by_placement:
            by_placement[key] = trainer.train_arm(candidate)
    arms = [(candidate, by_placement[_key(candidate.placement)]) for candidate in candidates]
    return sum_up(config, scores, arms, trainer.runs.method, base)


class _Trainer:
    """Trains arm after arm, what is not done yet, and says how far it is."""

    def __init__(self, config: Config, notify: Notify, candidates: Sequence[Candidate]) -> None:
        self._config, self._notify = config, notify
        self._store = Store(RunDir(config.run_dir).path)
        self.runs = Runs(config, self._told)
        self._candidates = candidates
        compare, num_arms = config.compare, len({_key(candidate.placement) for candidate in candidates})
        self._num_steps = num_arms * (compare.rates + compare.seeds - 1) * config.train.max_steps
        self._num_done, self._note = 0, ""

    def measure_base(self) -> list[float]:
        """Return what every held-out row is worth without adapters, and say what will be trained. Collective."""
        config, first = self._config, self._candidates[0].placement
        max_steps, compare = config.train.max_steps, config.compare
        num_arms = len({_key(candidate.placement) for candidate in self._candidates})
        num_runs = self._num_steps // max_steps
        further = num_arms * most_further(compare.rates)
        known = [self._store.find(self._at(0, seed), one.placement) for one in self._candidates for seed in (0, 1)]
        more = f", at most {further} more where the best rate lies at an end" if further else ""
        self._notify(
            "status",
            text=f"compare: {len(self._candidates)} arms, {num_runs} trainings of {max_steps} steps{more}; "
            f"{'those that are done already are kept' if any(known) else 'none is done yet'}",
        )
        measure, base = self.runs.method.measure, self._store.find_base(config, first)
        if base is None:
            self._notify("phase", text=f"measuring the {measure} without adapters")
            base = self.runs.measure_base(first)
            if not all(map(math.isfinite, base.values)):
                raise WorkerError(f"the model's {measure} is not finite even without adapters.")
            self._store.keep_base(config, first, base)
        # The trainings that search a rate measure one half after half of the steps, and all at the end.
        searching, further_seeds = compare.rates, compare.seeds - 1
        seconds = num_runs * base.stepping_seconds
        seconds += num_arms * (1.5 * searching + 0.5 * further_seeds) * base.measuring_seconds
        self._notify("status", text=f"compare: about {_minutes(seconds)} for {num_runs} trainings")
        return list(base.values)

    def train_arm(self, candidate: Candidate) -> Trained:
        """Return the trainings of one arm: rates until the best is bracketed, then further seeds. Collective."""
        num_rates, arm = self._config.compare.rates, Trained(candidate)
        todo: list[int] = first_exponents(num_rates)
        while todo:
            for exponent in todo:
                self._train_rate(arm, exponent)
            further = next_exponent(self._losses(arm), num_rates)
            if further is not None:
                self._num_steps += self._config.train.max_steps
            todo = [] if further is None else [further]
        arm.chosen = best_exponent(self._losses(arm))
        arm.by_seed = [
            arm.by_rate[arm.chosen] if not seed else self._trained(arm.candidate, arm.chosen, seed, None)
            for seed in range(self._config.compare.seeds)
        ]
        return arm

    def choosing(self, record: Record) -> float:
        """Return what a training comes to on the rows that choose, lower is better; inf where it is out."""
        if record.choosing is None:
            return math.inf
        return self.runs.method.sign * sum(record.choosing) / float(self.runs.method.targets_R[CHOOSING::2].sum())

    def _losses(self, arm: Trained) -> dict[int, float]:
        return {
            exponent: math.inf if exponent in arm.stopped else self.choosing(record)
            for exponent, record in arm.by_rate.items()
        }

    def _train_rate(self, arm: Trained, exponent: int) -> None:
        rivals = [np.array(record.half) for record in arm.by_rate.values() if record.half is not None]
        record = self._trained(arm.candidate, exponent, 0, rivals)
        arm.by_rate[exponent] = record
        if record.stopped_early:
            arm.stopped.add(exponent)

    def _trained(self, candidate: Candidate, exponent: int, seed: int, rivals: Sequence[np.ndarray] | None) -> Record:
        config = self._at(exponent, seed)
        rate = config.train.learning_rate
        self._note = f"{candidate.name} at {rate:.3g}, seed {config.train.seed}"
        found = self._store.find(config, candidate.placement)
        if found is not None and not self._is_enough(found, rivals):
            found = None
        if found is None:
            found = self.runs.train(config, candidate.placement, rivals)
            self._store.keep(config, candidate.placement, found)
            self._notify("status", text=f"{self._note}: {self._ended(found)} ({found.seconds:.1f} s)")
            self._num_done += config.train.max_steps - found.steps
        else:
            self._num_done += config.train.max_steps
        return found

    def _is_enough(self, found: Record, rivals: Sequence[np.ndarray] | None) -> bool:
        """Tell whether a kept training has what is needed: it may have been one of another search, or of none."""
        if found.diverged:
            return True
        if rivals is None:
            return not found.stopped_early
        if found.stopped_early:  # beside other rates than these it would have been trained to its end
            return self.runs.is_hopeless(found.half, rivals)
        return found.choosing is not None

    def _ended(self, found: Record) -> str:
        if found.diverged:
            return "diverged"
        if found.stopped_early:
            return f"stopped after {found.steps} steps, where it is clearly behind"
        assert found.reported is not None
        value = sum(found.reported) / float(self.runs.method.targets_R[REPORTED::2].sum())
        return f"{self.runs.method.measure} {value:.4f}"

    def _told(self, entry: dict[str, Any]) -> None:
        self._num_done += 1
        shown = next(f"{self._note}, {key} {entry[key]:.4f}" for key in ("reward", "loss") if key in entry)
        self._notify("training", done=min(self._num_done, self._num_steps), total=self._num_steps, note=shown)

    def _at(self, exponent: int, seed: int) -> Config:
        train = self._config.train
        return _with(self._config, learning_rate=train.learning_rate * 2.0**exponent, seed=train.seed + seed)


def _with(config: Config, **train: Any) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def _key(placement: Placement) -> str:
    return json.dumps([placement.modules, placement.rank, placement.alpha])


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
