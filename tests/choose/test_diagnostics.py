"""Findings appear when they should and only then; explanations, sweeps and tables say what was decided."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import plop_dist
from plop_dist.choose.bootstrap import type_intervals
from plop_dist.choose.diagnostics import diagnose
from plop_dist.choose.explain import explain
from plop_dist.choose.sweep import sweep
from plop_dist.config.loading import parse_config
from plop_dist.launch.rank import run_rank
from plop_dist.report.terminal import print_diagnostics, print_explanation, print_sweep, print_types
from plop_dist.rundir.stages import Stages
from plop_dist.values.scores import LeftOut, Scores
from tests.choose.cases import LLAMA, make_scores
from tests.fuzz.commands import run_here


def texts(scores: Scores, **options: object) -> str:
    return "\n".join(f"{d.severity}: {d.text}" for d in diagnose(scores, plop_dist.place(scores, **options)))


def with_intervals(scores: Scores) -> Scores:
    intervals = type_intervals(scores.modules, scores.samples)
    types = tuple(entry.model_copy(update={"nfn_ci95": intervals[entry.type]}) for entry in scores.types)
    return scores.model_copy(update={"types": types}).with_samples(scores.samples)


def test_sound_scores_have_no_finding() -> None:
    assert texts(with_intervals(make_scores())) == ""


def test_near_one_and_close_call() -> None:
    close = with_intervals(make_scores({"a_proj": 1.0, "b_proj": 1.002, "c_proj": 1.003, "d_proj": 1.004}, noise=0.3))
    found = texts(close, k=2)
    assert "warning: Every type's NFN is within 0.0" in found
    assert "of bootstrap resamples make the same choice" in found
    assert "intervals at the cut overlap" in found


def test_only_what_the_policy_may_choose_lies_at_the_cut() -> None:
    near = {"a_proj": 1.0, "b_proj": 1.002, "c_proj": 1.5}
    scores = with_intervals(make_scores(near, noise=0.3))
    overlap = "intervals at the cut overlap: a_proj (in)"
    assert overlap in texts(scores, k=1)
    assert overlap not in texts(scores, k=1, exclude=["*b_proj"])
    assert overlap not in texts(scores, policy="all")
    assert "intervals at the cut overlap: b_proj (in)" in texts(scores, policy="highest_k", k=2)
    assert "overlap" not in texts(scores, policy="highest_k", k=1)
    assert "overlap" in texts(scores, policy="budget", fit="rank", k=1, max_trainable_parameters=10**6)
    inside = texts(scores, policy="threshold", threshold=1.001)
    assert "The threshold 1.001 lies inside the interval of: a_proj " in inside
    assert "threshold" not in texts(scores, policy="threshold", threshold=1.25)


def test_narrow_few_skipped_and_left_out() -> None:
    scores = make_scores(widths={"o_proj": (576, 576)}, num_samples=8)
    modules = list(scores.modules)
    modules[1] = modules[1].model_copy(update={"num_skipped_tokens": 40})
    left_out = LeftOut(
        fqn="model.layers.9.mlp.up_proj", type="up_proj", in_features=4, out_features=4, reason="no_tokens"
    )
    scores = scores.model_copy(update={"modules": tuple(modules), "left_out": (left_out,)}).with_samples(scores.samples)
    found = texts(scores)
    assert "note: in_features below 1,000: o_proj (576). The theory is one of wide layers" in found
    tokens = modules[0].num_tokens
    assert "warning: Scored from fewer than 1,000 tokens: " in found
    assert f"o_proj (3 of 3 modules, fewest {tokens:,})" in found
    assert "40 of " in found
    assert "1 modules have no score (1 no tokens), among them model.layers.9.mlp.up_proj." in found
    assert "Scored from 8 samples" in found


def _with(scores: Scores, index: int = 0, **module: object) -> Scores:
    modules = list(scores.modules)
    modules[index] = modules[index].model_copy(update=module)
    return scores.model_copy(update={"modules": tuple(modules)}).with_samples(scores.samples)


def _near(distance: float) -> Scores:
    """Scores whose types lie within a distance of 1."""
    return make_scores({"a_proj": 1 - distance, "b_proj": 1.0, "c_proj": 1 + distance / 2}, noise=0.001)


LEFT = LeftOut(fqn="model.layers.9.mlp.pool", type="pool", in_features=4, out_features=4, reason="unknown_kind")
CLOSE = make_scores({"a_proj": 0.8, "b_proj": 0.8002, "c_proj": 1.5}, noise=0.3)
MADE = make_scores()
HYBRID = make_scores({**LLAMA, "in_proj": 0.5})


@pytest.mark.parametrize(
    ("speaks", "is_silent", "phrase"),
    [
        ((_near(0.09), {"k": 1}), (_near(0.11), {"k": 1}), "weights that were never trained"),
        ((CLOSE, {"k": 1}), (CLOSE, {"k": 2}), "score more samples or change placement.k."),
        (
            (CLOSE, {"policy": "threshold", "threshold": 0.8001}),
            (CLOSE, {"policy": "threshold", "threshold": 1.2}),
            "score more samples or change placement.threshold.",
        ),
        ((CLOSE, {"granularity": "module", "k": 4}), (CLOSE, {"k": 2}), "Granularity module is experimental"),
        (
            (CLOSE, {"granularity": "layer", "k": 2}),
            (CLOSE, {"granularity": "layer", "policy": "all"}),
            "Granularity layer is experimental",
        ),
        (
            (make_scores(widths={"o_proj": (999, 64)}), {}),
            (make_scores(widths={"o_proj": (1000, 64), "q_proj": (64, 64)}), {}),
            "in_features below 1,000: o_proj (999)",
        ),
        (
            (make_scores(widths={"o_proj": (1024, 8)}), {"rank": 9}),
            (make_scores(widths={"o_proj": (1024, 8)}), {"rank": 8}),
            "a higher rank than any update",
        ),
        (
            (_with(HYBRID, 7, role="recurrent"), {}),
            (_with(HYBRID, 7, role="recurrent"), {"exclude": ["in_proj"]}),
            "lie in the recurrent layers",
        ),
        ((_with(MADE, num_tokens=999), {}), (_with(MADE, num_tokens=1000), {}), "Scored from fewer than 1,000 tokens"),
        ((_with(MADE, num_skipped_tokens=1), {}), (MADE, {}), "note: 1 modules skipped tokens"),
        (
            (_with(MADE, num_skipped_tokens=20), {}),
            (_with(MADE, num_skipped_tokens=1), {}),
            "warning: 1 modules skipped tokens",
        ),
        ((MADE.model_copy(update={"left_out": (LEFT,)}), {}), (MADE, {}), "neither scored nor ever chosen"),
        (
            (MADE.model_copy(update={"left_out": (LEFT.model_copy(update={"reason": "no_tokens"}),)}), {}),
            (MADE.model_copy(update={"left_out": (LEFT,)}), {}),
            "1 modules have no score (1 no tokens)",
        ),
        ((make_scores(num_samples=15), {}), (make_scores(num_samples=16), {}), "the bootstrap understates"),
        ((make_scores(with_samples=False), {}), (MADE, {}), "confidence is unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_finding_speaks_where_it_must_and_nowhere_else(
    speaks: tuple[Scores, dict[str, object]], is_silent: tuple[Scores, dict[str, object]], phrase: str
) -> None:
    for (scores, options), is_expected in ((speaks, True), (is_silent, False)):
        assert (phrase in texts(scores, **options)) is is_expected


def test_experimental_granularity_says_how_much_lies_between_types() -> None:
    """Where only types differ all of the variance is theirs, where only layers do none is."""
    by_type = make_scores(noise=0.0)
    assert "100% lies between types and 0% between layers" in texts(by_type, granularity="module", k=3)
    modules = [
        m.model_copy(update={"nfn": 1.0 + (m.layer or 0), "gain": 2.0 + 2 * (m.layer or 0)}) for m in by_type.modules
    ]
    by_layer = by_type.model_copy(update={"modules": tuple(modules)}).with_samples(None)
    assert "0% lies between types and 100% between layers" in texts(by_layer, granularity="layer", k=1)


@pytest.mark.slow
def test_help_and_report_call_it_experimental(tmp_path: Path) -> None:
    shown = run_here(("place", "--help"))
    assert "is experimental: most of what differs among modules" in " ".join(shown.out.split())
    scores = make_scores()
    scores.to_file(tmp_path / "scores.json")
    for granularity in ("module", "type"):
        plop_dist.place(scores, granularity=granularity, k=3).to_file(tmp_path / "placement.json")
        assert run_here(("report", str(tmp_path))).status == 0
        page = (tmp_path / "report.html").read_text()
        assert ("Granularity module is experimental" in page) is (granularity == "module")


@pytest.mark.parametrize("width", [64, 256])
def test_weights_that_were_never_trained_are_said_to_be_at_any_width(width: int) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=300)).eval()
    found = diagnose(plop_dist.score(model, [{"input_ids": torch.randint(0, 300, (8, 32))}]))
    assert any("weights that were never trained" in finding.text for finding in found)


@pytest.mark.slow
def test_random_tokens_are_no_reason_to_doubt_trained_weights(tmp_path: Path) -> None:
    """What an earlier text said of them: data foreign to the model does not bring the NFN near 1."""
    data = {"path": "builtin:random", "num_samples": 2, "max_length": 32}
    config = parse_config({"run_dir": str(tmp_path), "model": {"name_or_path": "builtin:smollm2"}, "data": data})
    run_rank(Stages(config), ["score"], lambda kind, **fields: None)
    scores = Scores.from_file(tmp_path / "scores.json")
    assert not any("never trained" in finding.text for finding in diagnose(scores))
    assert scores.types[0].nfn < 0.7


def test_explanation_names_reason_next_best_and_alternatives() -> None:
    scores = make_scores({**LLAMA, "lm_head": 0.1})
    explanation = explain(scores, plop_dist.place(scores, k=3))
    verdicts = {verdict.type: verdict for verdict in explanation.verdicts}
    assert verdicts["lm_head"].reason == "excluded by 'lm_head'"
    assert verdicts["lm_head"].probability == 0
    assert verdicts["o_proj"].reason == "0.2256 below up_proj (1.1148), the nearest one left out"
    assert explanation.next_best is not None
    assert explanation.next_best.startswith("up_proj (NFN 1.1")
    parameters = {other.name: other.num_parameters for other in explanation.alternatives}
    assert parameters["this placement"] == parameters["highest_k"] == 9 * 16 * 2048
    assert parameters["all"] == 21 * 16 * 2048


def test_sweep_covers_every_k_and_fewer_samples() -> None:
    result = sweep(make_scores(), k=2)
    assert [row.value for row in result.steps] == list(range(1, 8))
    assert result.steps[2].added == "down_proj"
    assert result.steps[-1].confidence == 1.0
    assert [entry.num_samples for entry in result.by_samples] == [1, 2, 4, 8, 16, 24]
    assert result.by_samples[-1].is_final_choice
    assert sweep(make_scores(with_samples=False)).by_samples == ()


def test_a_pipe_gets_whole_lines_and_a_terminal_lines_that_fit() -> None:
    scores = make_scores(name="path/[red]with markup[/red]")
    placement = plop_dist.place(scores)
    for is_terminal in (False, True):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=is_terminal, width=80 if is_terminal else 40)
        print_types(scores, placement, console)
        print_explanation(explain(scores, placement), console)
        print_sweep(sweep(scores), console)
        print_diagnostics(diagnose(scores, placement), console)
        output = stream.getvalue()
        assert "path/[red]with markup[/red]" in output
        lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in output.splitlines()]
        if is_terminal:
            assert max(map(len, lines)) <= 80
            words = set(re.sub(r"\x1b\[[0-9;]*m", "", output).split())
            assert {"interval", "parameters", "P(chosen)", "Confidence:"} <= words, "a word is broken"
        else:
            assert lines[1] == "type          NFN  95% interval  modules  chosen  parameters"
            assert lines[2].startswith("o_proj     0.")
            assert any(
                line.startswith("Chosen: o_proj v_proj down_proj · 9 modules, rank 16, 294,912") for line in lines
            )


def test_chosen_recurrent_layers_of_a_hybrid_are_named_and_can_be_left_out() -> None:
    made = make_scores({**LLAMA, "in_proj": 0.5, "out_proj": 0.6})
    modules = [
        module.model_copy(update={"role": "recurrent"}) if module.type in ("in_proj", "out_proj") else module
        for module in made.modules
    ]
    hybrid = made.model_copy(update={"modules": tuple(modules)}).with_samples(made.samples)
    found = texts(hybrid)
    assert "in_proj, out_proj lie in the recurrent layers of this hybrid model (6 of the chosen modules)" in found
    assert "arXiv 2604.22127" in found
    assert "placement.exclude=[lm_head,in_proj,out_proj] leaves them out" in found
    placement = plop_dist.place(hybrid, exclude=["lm_head", "in_proj", "out_proj"])
    assert not any("recurrent" in finding.text for finding in diagnose(hybrid, placement))
    recurrent = [module for module in modules if module.role]
    alone = hybrid.model_copy(update={"modules": tuple(recurrent)}).with_samples(None)
    assert "recurrent" not in texts(alone, k=1)


def test_what_a_kernel_reads_past_adapters_is_chosen_by_include_alone() -> None:
    made = make_scores({**LLAMA, "out_proj": 0.1})
    modules = [
        module.model_copy(update={"role": "kernel"}) if module.type == "out_proj" else module for module in made.modules
    ]
    scores = made.model_copy(update={"modules": tuple(modules)}).with_samples(made.samples)
    assert "out_proj" not in plop_dist.place(scores, policy="all").module_types
    assert plop_dist.place(scores, include=["out_proj"], k=1).module_types == ("out_proj",)
