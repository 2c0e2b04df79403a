"""Findings appear when they should and only then; explanations, sweeps and tables say what was decided."""

from __future__ import annotations

import io
import re

from rich.console import Console

import plop_dist
from plop_dist.choose.bootstrap import type_intervals
from plop_dist.choose.diagnostics import diagnose
from plop_dist.choose.explain import explain
from plop_dist.choose.sweep import sweep
from plop_dist.report.terminal import print_diagnostics, print_explanation, print_sweep, print_types
from plop_dist.values.scores import LeftOut, Scores
from tests.choose.cases import LLAMA, make_scores


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
    assert "note: in_features below 1,000, outside the regime of the theory (wide layers): o_proj (576)." in found
    tokens = modules[0].num_tokens
    assert "warning: Scored from fewer than 1,000 tokens: " in found
    assert f"o_proj (3 of 3 modules, fewest {tokens:,})" in found
    assert "40 of " in found
    assert "1 modules have no score (1 no tokens), among them model.layers.9.mlp.up_proj." in found
    assert "Scored from 8 samples" in found


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
