"""Policies choose what they say, never exceed a budget, break ties by name, and refuse what matches nothing."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plop_dist
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import ConfigError, PlacementError
from plop_dist.values.scores import ModuleScore
from tests.choose.cases import LLAMA, make_scores, scores_of

GQA = {"k_proj": (1024, 256), "v_proj": (1024, 256), "up_proj": (1024, 4096), "down_proj": (4096, 1024)}


def test_lowest_k_is_the_paper_choice() -> None:
    placement = plop_dist.place(make_scores(), k=3)
    assert placement.module_types == ("o_proj", "v_proj", "down_proj")
    assert placement.modules[:3] == (
        "model.layers.0.mlp.down_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.self_attn.v_proj",
    )
    assert placement.num_trainable_parameters == 9 * 16 * 2048
    assert placement.selection_confidence is not None
    assert placement.selection_confidence > 0.99


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"policy": "highest_k", "k": 2}, {"q_proj", "k_proj"}),
        ({"policy": "threshold", "threshold": 1.0}, {"o_proj", "v_proj"}),
        ({"policy": "attention"}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"policy": "mlp"}, {"gate_proj", "up_proj", "down_proj"}),
        ({"policy": "all"}, set(LLAMA)),
        ({"exclude": ["lm_head", "o_proj", "*.mlp.*"], "k": 2}, {"v_proj", "q_proj"}),
        ({"include": ["self_attn.*"], "k": 2}, {"v_proj", "o_proj"}),
        ({"k": 1, "include": ["lm_head", "q_proj"], "exclude": []}, {"lm_head"}),
    ],
)
def test_policies(options: dict, expected: set[str]) -> None:
    scores = make_scores({**LLAMA, "lm_head": 0.1})
    assert set(plop_dist.place(scores, **options).module_types) == expected


def test_lm_head_is_out_by_default_and_experts_on_request() -> None:
    scores = make_scores({**LLAMA, "lm_head": 0.1})
    assert "lm_head" not in plop_dist.place(scores, policy="all").module_types
    expert = ModuleScore(
        fqn="model.layers.0.mlp.experts.3.up_proj",
        type="experts.up_proj",
        layer=0,
        in_features=32,
        out_features=16,
        num_tokens=9,
        gain=0.2,
        baseline=1.0,
        nfn=0.2,
    )
    moe = scores_of([*scores.modules, expert])
    assert plop_dist.place(moe, k=1).module_types == ("o_proj",)
    assert plop_dist.place(moe, k=1, experts=True).module_types == ("experts.up_proj",)
    router = expert.model_copy(update={"fqn": "model.layers.0.mlp.gate", "type": "gate", "nfn": 0.1, "gain": 0.1})
    for inner in ("model.layers.0.moe.router.layer", "model.layers.0.mlp.gate.wg"):  # GraniteMoE, Hunyuan
        inside = router.model_copy(update={"fqn": inner, "type": inner.rpartition(".")[2]})
        assert inner not in plop_dist.place(scores_of([*moe.modules, inside]), policy="all").modules
    indexer = router.model_copy(update={"fqn": "model.layers.0.self_attn.indexer.wk", "type": "wk"})  # DeepSeek V3.2
    sparse = scores_of([*scores.modules, indexer])
    assert "wk" not in plop_dist.place(sparse, policy="all").module_types
    assert plop_dist.place(sparse, k=1, include=["wk", "o_proj"]).module_types == ("wk",)
    routed = scores_of([*moe.modules, router])
    assert "gate" not in plop_dist.place(routed, policy="all", experts=True).module_types
    assert plop_dist.place(routed, k=1, include=["gate", "o_proj"]).module_types == ("gate",)
    with_gate = plop_dist.place(scores_of([*scores.modules, router]), k=1)  # without experts it is a linear like others
    assert with_gate.module_types == ("gate",)


def test_layer_1_does_not_match_layer_10() -> None:
    scores = make_scores({"v_proj": 0.5}, num_layers=12)
    chosen = plop_dist.place(scores, policy="all", include=["*.layers.1.*"]).modules
    assert chosen == ("model.layers.1.self_attn.v_proj",)


def test_granularity_layer_and_module() -> None:
    scores = make_scores(num_layers=4)
    layers = plop_dist.place(scores, granularity="layer", k=2)
    assert len(layers.modules) == 2 * len(LLAMA)
    modules = plop_dist.place(scores, granularity="module", k=5)
    lowest = sorted(scores.modules, key=lambda module: module.nfn)[:5]
    assert set(modules.modules) == {module.fqn for module in lowest}


def test_rank_pattern_counts_and_keeps_only_what_is_chosen() -> None:
    placement = plop_dist.place(make_scores(), k=2, rank=8, rank_pattern={"v_proj": 32, "q_proj": 4})
    assert placement.rank_pattern == {"v_proj": 32}
    assert placement.num_trainable_parameters == 3 * (8 + 32) * 2048


def test_ties_go_to_the_natural_name_whatever_the_order() -> None:
    scores = make_scores({"b_proj": 1.0, "a_proj": 1.0, "c_proj": 1.0}, noise=0.0, with_samples=False)
    turned = scores_of(list(reversed(scores.modules)))
    for given_scores in (scores, turned):
        assert plop_dist.place(given_scores, k=2).module_types == ("a_proj", "b_proj")
        assert plop_dist.place(given_scores, policy="highest_k", k=1).module_types == ("a_proj",)


def test_place_is_deterministic_and_takes_a_section_a_name_or_options() -> None:
    scores = make_scores(noise=0.5)
    first = plop_dist.place(scores, PlacementConfig(k=2))
    assert first == plop_dist.place(scores, k=2) == plop_dist.place(scores, "lowest_k", k=2)
    assert first.selection_confidence == plop_dist.place(scores, k=2).selection_confidence


def test_scores_without_samples_still_place() -> None:
    placement = plop_dist.place(make_scores(with_samples=False))
    assert placement.selection_confidence is None
    assert any("samples.safetensors" in text for text in placement.diagnostics)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"k": 8}, PlacementError, r"placement\.k is 8, but there are only 7 candidate types: down_proj, .*v_proj"),
        ({"kk": 3}, ConfigError, r"unknown key 'placement\.kk'\. Did you mean 'k'\?"),
        ({"policy": "lowest"}, ConfigError, r"placement\.policy: .*'lowest'"),
        ({"exclude": ["qproj"]}, PlacementError, r"exclude 'qproj' matches no module .*Did you mean 'q_proj'\?"),
        ({"include": ["up"]}, PlacementError, "include 'up' matches no module"),
        ({"rank_pattern": {"vproj": 4}}, PlacementError, r"rank_pattern 'vproj' .*Did you mean 'v_proj'\?"),
        ({"rank": 10**30}, ConfigError, r"rank: .*less than or equal to 1048576"),
        ({"rank_pattern": {"v_proj": 0}}, ConfigError, r"rank_pattern\.v_proj: .*greater than or equal to 1"),
        ({"policy": "threshold"}, ConfigError, r"needs placement\.threshold"),
        ({"policy": "threshold", "threshold": 0.1}, PlacementError, "lowest NFN is 0.9"),
        ({"policy": "budget"}, ConfigError, "needs placement.max_trainable_parameters"),
        ({"policy": "budget", "max_trainable_parameters": 9}, PlacementError, "smallest adapter, on"),
        (
            {"policy": "budget", "fit": "rank", "max_trainable_parameters": 9},
            PlacementError,
            "rank 1 on the chosen modules",
        ),
        ({"exclude": ["*_proj"]}, PlacementError, "No module is left to choose from"),
    ],
)
def test_mistakes_are_named(options: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        plop_dist.place(make_scores(), **options)
    assert caught.value.exit_status == 2


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(0.1, 3), min_size=1, max_size=7),
    limit=st.integers(10_000, 900_000),
    rank=st.integers(1, 16),
)
def test_budget_beats_every_same_size_alternative(values: list[float], limit: int, rank: int) -> None:
    nfn = dict(zip(LLAMA, values, strict=False))
    scores = make_scores(nfn, num_layers=1, noise=0.0, widths=GQA, with_samples=False)
    cost = {module.type: rank * (module.in_features + module.out_features) for module in scores.modules}
    if min(cost.values()) > limit:
        with pytest.raises(PlacementError, match="smallest adapter"):
            plop_dist.place(scores, policy="budget", max_trainable_parameters=limit, rank=rank)
        return
    placement = plop_dist.place(scores, policy="budget", max_trainable_parameters=limit, rank=rank)
    assert placement.num_trainable_parameters <= limit
    mean = sum(nfn.values()) / len(nfn)
    gap = {kind: mean - value for kind, value in nfn.items()}
    chosen = sum(gap[kind] for kind in placement.module_types)
    for size in range(1, len(nfn) + 1):
        for other in itertools.combinations(nfn, size):
            if sum(cost[kind] for kind in other) <= limit:
                assert sum(gap[kind] for kind in other) <= chosen + 1e-6


@settings(max_examples=20, deadline=None)
@given(limit=st.integers(20_000, 3_000_000), k=st.integers(1, 7))
def test_fitted_rank_is_the_highest_that_fits(limit: int, k: int) -> None:
    scores = make_scores(num_layers=1, widths=GQA, with_samples=False)
    placement = plop_dist.place(scores, policy="budget", fit="rank", max_trainable_parameters=limit, k=k)
    per_rank = placement.num_trainable_parameters // placement.rank
    assert placement.num_trainable_parameters <= limit
    assert per_rank * (placement.rank + 1) > limit or placement.rank == 1024
    assert placement.alpha / placement.rank == pytest.approx(2.0)


def test_ranks_beyond_a_weight_s_own_are_refused_or_said() -> None:
    """No update of a matrix has a higher rank than its smaller side."""
    scores = make_scores(num_layers=1, widths=GQA, with_samples=False)
    with pytest.raises(PlacementError, match=r"placement\.rank is 4096 for v_proj, whose weight of 256 x 1024 takes an "
                       r"update of rank 256 at most; so do .*; set placement\.rank=256 or less"):  # fmt: skip
        plop_dist.place(scores, rank=4096)
    placement = plop_dist.place(scores, rank=300)
    said = "v_proj (rank 300, 256 at most); placement.rank_pattern={v_proj: 256}"
    assert any(said in text for text in placement.diagnostics)
    mended = plop_dist.place(scores, rank=300, rank_pattern={"v_proj": 256})
    assert not any("at most" in text for text in mended.diagnostics)
    with pytest.raises(PlacementError, match=r"placement\.rank_pattern is 999 for v_proj.*=\{v_proj: 256\}\.$"):
        plop_dist.place(scores, k=1, include=["v_proj"], rank_pattern={"v_proj": 999})


def test_greedy_budget_over_modules_stays_within_it() -> None:
    scores = make_scores(num_layers=12, widths=GQA)
    placement = plop_dist.place(scores, policy="budget", granularity="module", max_trainable_parameters=700_000)
    assert 600_000 < placement.num_trainable_parameters <= 700_000


def test_placing_needs_no_framework() -> None:
    code = (
        "import sys, plop_dist.choose.place, plop_dist.choose.explain, plop_dist.choose.sweep;"
        "import plop_dist.report.terminal;"
        "print([m for m in ('torch', 'transformers', 'ray', 'peft') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
