"""The budget's rule orders only what it can reach and counts all rows at once, and chooses what the plain rule does."""

from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plop_dist.choose.candidates import find_candidates
from plop_dist.choose.policies.budget import BudgetRule
from plop_dist.choose.policies.lowest_highest import choose_first
from plop_dist.choose.units import Candidates
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import PlacementError
from plop_dist.values.adapter_size import num_trainable_parameters
from plop_dist.values.scores import LeftOut, ModuleScore
from tests.values.test_adapter_size import expert, fused


def candidates_of(
    rng: np.random.Generator, num_layers: int, granularity: str, ranks: dict[str, int], silent: float = 0.0
) -> Candidates:
    """Return candidates with fused linears and experts, of which some are silent."""
    parts = []
    for layer in range(num_layers):
        parts += [fused(name, rows, layer=layer) for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16))]
        for index, (name, sizes) in itertools.product(
            range(3), (("gate_proj", (32, 48)), ("up_proj", (32, 48)), ("down_proj", (48, 32)))
        ):
            part = expert(index, name, sizes)
            moved = {"fqn": part.fqn.replace("m.layers.0", f"m.layers.{layer}")}
            parts.append(
                part.model_copy(update={**moved, "stored_in": str(part.stored_in).replace(".0.", f".{layer}.")})
            )
    scores, left_out = [], []
    for part in parts:
        tree = {**part.model_dump(), "layer": part.layer or 0}
        if part.storage == "expert_parameter" and rng.random() < silent:
            left_out.append(LeftOut(**tree, reason="no_tokens"))
        else:
            nfn = float(rng.choice([0.5, 0.75, 1.0])) + float(rng.random() < 0.8) * float(rng.random())
            scores.append(ModuleScore(**tree, num_tokens=5, gain=nfn, baseline=1.0, nfn=nfn))
    config = PlacementConfig(
        policy="budget", max_trainable_parameters=1, granularity=granularity, experts=True, rank=4, rank_pattern=ranks
    )
    return find_candidates(scores, config, left_out)


def plain_choice(candidates: Candidates, values_U: np.ndarray, limit: int) -> np.ndarray:
    """The rule as its docstring says it, one unit and one set at a time."""
    config = candidates.config

    def cost(units: list[int]) -> int:
        modules = [m for m, unit in zip(candidates.modules, candidates.unit_M, strict=True) if unit in units]
        rank_of = {m.fqn: config.rank_pattern.get(m.type, config.rank) for m in (*modules, *candidates.left_out)}
        return num_trainable_parameters(modules, lambda m: rank_of[m.fqn], candidates.left_out)

    everything = list(range(len(values_U)))
    is_additive = sum(cost([unit]) for unit in everything) == cost(everything)
    gap = np.round(np.nanmean(values_U) - values_U, 12)
    fits = [unit for unit in everything if cost([unit]) <= limit and not np.isnan(values_U[unit])]
    positive = [unit for unit in fits if gap[unit] > 0]
    chosen: list[int] = []
    if not positive:
        chosen = sorted(fits, key=lambda unit: (-gap[unit], unit))[:1]
    elif len(positive) <= (12 if is_additive else 8):
        # In the order in which a set's bits count, for ties.
        sets = [[u for bit, u in enumerate(positive) if number >> bit & 1] for number in range(1, 2 ** len(positive))]
        sets = [units for units in sets if cost(units) <= limit]
        chosen = min(sets, key=lambda units: (-round(float(sum(gap[unit] for unit in units)), 9), cost(units)))
    else:
        for unit in sorted(positive, key=lambda unit: (-gap[unit], unit)):
            if sum(cost([other]) for other in chosen) + cost([unit]) <= limit:
                chosen.append(unit)
        while cost(chosen) > limit:
            chosen.pop()
    return np.isin(everything, chosen)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_layers=st.integers(1, 3),
    granularity=st.sampled_from(["type", "module", "layer"]),
    limit=st.integers(100, 30_000),
    ranks=st.sampled_from([{}, {"v_proj": 16}, {"experts.up_proj": 1, "q_proj": 8}, {"k_proj": 1, "q_proj": 64}]),
    num_spare=st.sampled_from([0, 64]),
    silent=st.sampled_from([0.0, 0.2]),
)
@pytest.mark.slow
def test_the_rule_is_the_plain_rule(
    seed: int, num_layers: int, granularity: str, limit: int, ranks: dict[str, int], num_spare: int, silent: float
) -> None:
    rng = np.random.default_rng(seed)
    candidates = candidates_of(rng, num_layers, granularity, ranks, silent)
    try:
        # Without spare ones only the units that the budget can reach are put in order, however few there are in all.
        with mock.patch("plop_dist.choose.policies.budget._SPARE_UNITS", num_spare):
            rule = BudgetRule(candidates, 4, limit)
    except PlacementError:
        assert candidates.costs.min() > limit
        return
    values = candidates.unit_nfn * rng.choice([0.9, 1.0, 1.1], (4, len(candidates.units)))
    values[rng.random(values.shape) < 0.1] = np.nan
    values[0] = candidates.unit_nfn
    values = np.round(values[~np.isnan(values).all(axis=1)], 12)
    for chosen, row in zip(rule(values), values, strict=True):
        np.testing.assert_array_equal(chosen, plain_choice(candidates, row, limit))


def test_small_units_beyond_those_that_are_ordered_fill_the_budget() -> None:
    candidates = candidates_of(np.random.default_rng(1), 3, "module", {"k_proj": 1})
    is_small = np.array([name.endswith("k_proj") for name in candidates.units])
    values = np.linspace(0.5, 1.0, len(candidates.units))
    values[np.flatnonzero(~is_small)[-6:]] = 9.0
    values[is_small] = [1.1, 1.2, 1.3]  # below the mean, and after all others that are
    lowest = [index for index, name in enumerate(candidates.units) if ".0.mlp" in name and "down_proj" in name]
    values[lowest] = 0.1
    # Two of the small ones are worth 48 parameters each.
    limit = int(candidates.costs[lowest].sum()) + 100
    with mock.patch("plop_dist.choose.policies.budget._SPARE_UNITS", 0):
        rule = BudgetRule(candidates, 4, limit)
    assert rule._num_first < (values < values.mean()).sum() - is_small.sum(), "they lie beyond"
    chosen = rule(values[None])[0]
    np.testing.assert_array_equal(chosen, plain_choice(candidates, values, limit))
    assert (chosen & is_small).sum() == 2


def test_what_costs_more_together_is_left_again() -> None:
    """Gates of some experts and up projections of others make a whole parameter of all these experts."""
    candidates = candidates_of(np.random.default_rng(1), 3, "module", {})
    is_gate = np.array(["experts.0.gate" in name or "experts.1.gate" in name for name in candidates.units])
    is_up = np.array(["experts.2.up" in name for name in candidates.units])
    values = np.where(is_gate, 0.5, np.where(is_up, 0.6, 1.0 + np.arange(len(is_up)) / 100))
    limit = int(candidates.costs[is_gate | is_up].sum())
    chosen = BudgetRule(candidates, 4, limit)(values[None])[0]
    np.testing.assert_array_equal(chosen, plain_choice(candidates, values, limit))
    assert chosen[is_gate].all()
    assert not chosen[is_up].all()


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([1.0, 2.0, 2.5, float("nan")]), min_size=5, max_size=5), min_size=1, max_size=6
    ),
    k=st.integers(1, 6),
)
def test_the_first_k_go_by_value_and_then_by_place(rows: list[list[float]], k: int) -> None:
    values = np.array(rows)
    for row, chosen in zip(values, choose_first(values, k), strict=True):
        known = [index for index in range(len(row)) if not np.isnan(row[index])]
        assert np.flatnonzero(chosen).tolist() == sorted(sorted(known, key=lambda index: (row[index], index))[:k])
