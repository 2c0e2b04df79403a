"""Every policy is one whole object, asked for what it knows; the rest of the package does not know its name."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plop_dist
from plop_dist.choose.decision import decide
from plop_dist.choose.explain import explain
from plop_dist.choose.policies.lowest_highest import LOWEST_K, choose_first
from plop_dist.choose.policy import Policy
from plop_dist.choose.sweep import _share_of_first, sweep_of
from plop_dist.config.schema import PlacementConfig
from plop_dist.registry import POLICIES, load
from tests.choose.cases import make_scores

ROOT = Path(plop_dist.__file__).parent
# What each policy cannot do without.
OPTIONS = {"threshold": {"threshold": 1.05}, "budget": {"max_trainable_parameters": 500_000}}


@pytest.mark.parametrize("name", POLICIES.own)
def test_a_policy_says_what_it_is_and_keeps_the_contract(name: str) -> None:
    policy = load(POLICIES, name)
    assert isinstance(policy, Policy)
    assert policy.name == name
    assert policy.summary
    assert "\n" not in policy.summary
    assert set(policy.parameters) <= set(PlacementConfig.model_fields)
    scores = make_scores(noise=0.3)
    decision = decide(scores, name, **OPTIONS.get(name, {}))
    # Rows are chosen each by itself.
    values = np.concatenate(list(decision.candidates.resampled(scores.samples, num_resamples=20)))
    together = decision.rule(values)
    assert together.dtype == bool
    np.testing.assert_array_equal(together, np.concatenate([decision.rule(row[None]) for row in values]))
    explanation = explain(scores, plop_dist.place(scores, name, **OPTIONS.get(name, {})), decision)
    assert explanation.rule == policy.sentence(decision.config)
    assert all(verdict.reason for verdict in explanation.verdicts)
    assert sweep_of(decision).parameter == "k"


def test_the_page_lists_every_policy_with_its_own_words() -> None:
    page = (ROOT / "choose" / "README.md").read_text(encoding="utf-8")
    for name in POLICIES.own:
        policy = load(POLICIES, name)
        assert f"| `{name}` | {policy.summary} | {', '.join(policy.parameters)}" in page


def test_no_other_file_asks_for_a_policy_by_name() -> None:
    """No `policy == "budget"` anywhere: names stand in the registry, the policies themselves, and a default."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        if place == "registry.py" or place.startswith("choose/policies/"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                text = ast.unparse(node)
                if re.search(r"\bpolicy\b", text) and any(f"'{name}'" in text for name in POLICIES.own):
                    found.append(f"{place}: {text}")
    assert found == []


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("policy", ["lowest_k", "highest_k"])
def test_sweeps_over_k_count_as_placing_for_every_k_does(policy: str, noise: float) -> None:
    scores = make_scores({"b_proj": 1.0, "a_proj": 1.0, "d_proj": 1.1, "c_proj": 1.02}, noise=noise)
    steps = sweep_of(decide(scores, policy, k=1)).steps
    assert [step.value for step in steps] == [1, 2, 3, 4]
    for step in steps:
        placement = plop_dist.place(scores, policy, k=step.value)
        assert step.confidence == placement.selection_confidence
        assert step.num_parameters == placement.num_trainable_parameters
        assert step.num_modules == len(placement.modules)
        assert step.added in placement.module_types


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([1.0, 2.0, 3.0, float("nan")]), min_size=6, max_size=6), min_size=1, max_size=5
    ),
    order=st.permutations(range(6)),
    k=st.sets(st.integers(1, 5), max_size=3),
)
def test_the_first_are_the_same_where_none_comes_after_another(
    rows: list[list[float]], order: list[int], k: set[int]
) -> None:
    values, order_U, k_K = np.array(rows), np.array(order), np.array([*sorted(k), 6])
    decision: Any = SimpleNamespace(
        policy=LOWEST_K, candidates=SimpleNamespace(resampled=lambda _: iter(np.split(values, len(values))))
    )
    same = [(choose_first(values, k) == np.isin(range(6), order_U[:k])).all(axis=1).mean() for k in k_K.tolist()]
    np.testing.assert_allclose(_share_of_first(decision, cast(Any, None), order_U, k_K), same)


def test_a_unit_without_tokens_is_never_among_the_first() -> None:
    scores = make_scores({"a_proj": 1.0, "b_proj": 1.5, "c_proj": 2.0}, num_layers=1, noise=0.1)
    samples = scores.samples
    assert samples is not None
    # The lowest type is seen in one sample alone, which a third of the resamples lack.
    tokens, gain = samples.num_tokens.copy(), samples.gain_total.copy()
    tokens[0, 1:], gain[0, 1:] = 0, 0
    sparse = type(samples)(samples.fqns, samples.sample_ids, gain, tokens, samples.num_skipped)
    scores = scores.with_samples(sparse)
    for step in sweep_of(decide(scores, k=1)).steps:
        assert step.confidence == plop_dist.place(scores, k=step.value).selection_confidence
        assert 0.5 < step.confidence < 0.75
