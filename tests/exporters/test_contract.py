"""What every export target keeps, whoever brings it: all that the registry knows are held to it, by name."""

from __future__ import annotations

import ast
import copy
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from plop_dist.errors import ExportError
from plop_dist.exporters.exporter import Exporter, find_exporter
from plop_dist.exporters.fits import fit
from plop_dist.registry import EXPORTERS, names
from plop_dist.values.placement import Export, Placement
from tests.exporters.cases import llama_projections, model_of, place, projection, projections_of, scores_of
from tests.exporters.hostile import NAMES, arguments, assert_nothing_runs

TARGETS = names(EXPORTERS)
LLAMA = scores_of(llama_projections())
RANKS = {"r", "rank", "dim", "lora_r", "lora_rank", "lora-rank"}
ALPHAS = {"alpha", "lora_alpha", "lora-alpha"}


@pytest.fixture(params=TARGETS)
def exporter(request: pytest.FixtureRequest) -> Exporter:
    return find_exporter(request.param)


def placements() -> Iterator[Placement]:
    """Yield placements of every kind that a target may have no words for."""
    qkv, mlp = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]
    for types in (["v_proj"], qkv, ["o_proj", "down_proj"], [*qkv, *mlp], ["v_proj", "down_proj"]):
        yield place(LLAMA, types, rank=16, alpha=48)
    for types in ([*qkv, "o_proj", *mlp], [*qkv, "o_proj"], mlp):
        yield place(LLAMA, types, rank=16, alpha=32)
    yield place(LLAMA, qkv, where=lambda item: item.layer == 1)
    yield place(LLAMA, where=lambda item: item.fqn == "model.layers.1.self_attn.v_proj")
    yield place(LLAMA, [*qkv, *mlp], rank_pattern={"v_proj": 16, "model.layers.0.mlp.up_proj": 2})
    yield place(LLAMA, qkv, alpha=2.5)
    for family, types in (
        ("phi3", qkv), ("phi3", ["v_proj"]), ("gpt2", ["c_fc"]), ("qwen3_moe", ["experts.down_proj", "v_proj"]),
        ("qwen3_moe", ["experts.up_proj"]), ("mixtral", ["gate"]),
    ):  # fmt: skip
        yield place(scores_of(projections_of(model_of(family))), types)


def outcomes(exporter: Exporter, placement: Placement) -> Iterator[tuple[str, bool, Export | ExportError]]:
    for engine in exporter.engines:
        for widen in (False, True):
            try:
                yield engine, widen, exporter.export(placement, engine=engine, widen=widen)
            except ExportError as error:
                yield engine, widen, error


def exports(exporter: Exporter) -> Iterator[tuple[Placement, Export]]:
    for placement in placements():
        for _, _, outcome in outcomes(exporter, placement):
            if isinstance(outcome, Export):
                yield placement, outcome


def tree_of(name: str, text: str) -> Any:
    """Return what an exported file says, whatever it is written in."""
    if name.endswith(".json"):
        return json.loads(text)
    if name.endswith((".yaml", ".yml")):
        return yaml.safe_load(text)
    if name.endswith(".toml"):
        return tomllib.loads(text)
    if name.endswith(".py"):
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        return {item.arg: ast.literal_eval(item.value) for item in calls[0].keywords}
    words = shlex.split(text)
    flags = [index for index, word in enumerate(words) if word.startswith("--")]
    assert flags, f"{name} is in no language that the contract knows"
    ends = [*flags[1:], len(words)]
    return {words[at].removeprefix("--"): words[at + 1 : end] for at, end in zip(flags, ends, strict=True)}


def settings(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each setting of a tree under its dotted key; rank patterns are settings as a whole."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and not path.endswith("_pattern"):
            yield from settings(value, f"{path}.")
        else:
            yield path, value


def test_it_says_of_itself_what_people_choose_by(exporter: Exporter, request: pytest.FixtureRequest):
    assert exporter.name == request.node.callspec.params["exporter"]
    assert exporter.flags_in in ("shell", "yaml", "toml", "python")
    for lines in (exporter.engines, exporter.keys, exporter.limits):
        assert isinstance(lines, tuple)
        assert len(set(lines)) == len(lines) > 0
    for line in (exporter.summary, exporter.matching, *exporter.limits, *exporter.keys):
        assert line == line.strip() != ""
        assert "\n" not in line
        assert not line.endswith(".")


def test_it_is_pure_and_the_same_twice(exporter: Exporter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for placement in placements():
        before = copy.deepcopy(placement.model_dump()), copy.deepcopy(placement.source.model_dump())
        first, second = [
            [(engine, widen, str(outcome)) for engine, widen, outcome in outcomes(exporter, placement)]
            for _ in range(2)
        ]
        assert first == second
        assert before == (placement.model_dump(), placement.source.model_dump())
    assert list(tmp_path.iterdir()) == []


def test_what_it_writes_parses_and_sets_its_keys_alone(exporter: Exporter):
    found = set()
    for _, export in exports(exporter):
        assert export.target == exporter.name
        assert export.files
        assert export.flags
        for name, text in export.files.items():
            assert not name.startswith(("/", "..")), name
            assert text.endswith("\n")
            found |= {key for key, _ in settings(tree_of(name, text))}
    assert found
    assert found <= set(exporter.keys)


def test_its_flags_say_what_its_files_say(exporter: Exporter, tmp_path):
    for _, export in exports(exporter):
        values = {str(item) for name, text in export.files.items() for item in leaves(tree_of(name, text))}
        if exporter.flags_in == "shell":
            words = [word for flag in export.flags for word in shlex.split(flag)]
            assert words
            shown = " ".join(words)
        elif exporter.flags_in == "yaml":
            assert yaml.safe_load("\n".join(export.flags)) in [tree_of(*item) for item in export.files.items()]
            continue
        elif exporter.flags_in == "toml":
            assert tomllib.loads("\n".join(export.flags)) in [tree_of(*item) for item in export.files.items()]
            continue
        else:
            (flag,) = export.flags
            call = ast.parse(flag, mode="eval").body
            assert isinstance(call, ast.Call)
            shown = " ".join(str(leaf) for item in call.keywords for leaf in leaves(ast.literal_eval(item.value)))
        rank_and_names = {value for value in values if re.search(r"proj|linear|wqkv|\bw\d\b|^\d+$", value)}
        assert all(value in shown for value in rank_and_names), (rank_and_names, shown)


def leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from leaves(value)
    elif not isinstance(tree, bool) and tree is not None:
        yield tree


def test_alpha_over_rank_is_the_placements(exporter: Exporter):
    if not any(key.rpartition(".")[2] in ALPHAS for key in exporter.keys):
        assert any("alpha" in limit for limit in exporter.limits), "without an alpha it must say which one there is"
        return
    num_seen = 0
    for placement, export in exports(exporter):
        for name, text in export.files.items():
            found = {key.rpartition(".")[2]: value for key, value in settings(tree_of(name, text))}
            (rank,) = [found[key] for key in found.keys() & RANKS]
            (alpha,) = [found[key] for key in found.keys() & ALPHAS]
            rank, alpha = (float(value[0] if isinstance(value, list) else value) for value in (rank, alpha))
            assert alpha / rank == pytest.approx(placement.alpha / placement.rank)
            num_seen += 1
            ranks, alphas = ([value for key, value in found.items() if key.endswith(end)]
                             for end in ("rank_pattern", "alpha_pattern"))  # fmt: skip
            if ranks:
                assert ranks[0].keys() == alphas[0].keys()
                for key in ranks[0]:
                    assert alphas[0][key] / ranks[0][key] == pytest.approx(placement.alpha / placement.rank)
    assert num_seen


def test_what_it_cannot_express_is_refused_and_what_it_widens_is_said(exporter: Exporter):
    num_exact, num_refused = 0, 0
    for placement in placements():
        for engine, widen, outcome in outcomes(exporter, placement):
            verdict = fit(exporter, engine, placement)
            assert (verdict.target, verdict.engine) == (exporter.name, engine)
            if isinstance(outcome, ExportError):
                assert "Nearest choice: " in str(outcome)
                num_refused += 1
                assert verdict.verdict == ("refused" if widen else verdict.verdict) != "exact"
                assert verdict.reasons
            elif not widen:
                assert outcome.widened == ()
                assert (verdict.verdict, verdict.reasons) == ("exact", ())
                num_exact += 1
            elif verdict.verdict == "with --widen":
                assert outcome.widened == verdict.reasons
    assert num_exact
    assert num_refused


def test_an_unknown_engine_is_refused(exporter: Exporter):
    with pytest.raises(ExportError, match=rf"^--engine is 'jax', but {exporter.name} has: {exporter.engines[0]}"):
        exporter.export(place(LLAMA, ["o_proj", "down_proj"]), engine="jax")


def test_names_run_nothing_in_a_shell(exporter: Exporter, tmp_path):
    """However a name reads: in flags pasted behind a command, and in what is no shell's, pasted by mistake."""
    flags = []
    for name in NAMES:
        hostile = [projection(f"model.layers.{layer}.self_attn.{name}", 32, 32) for layer in range(2)]
        scores = scores_of([*llama_projections(), *hostile], name=f"/models/{name}")
        placement = place(scores, ["o_proj", "v_proj", name])
        flags += [item.flags for _, _, item in outcomes(exporter, placement) if isinstance(item, Export)]
    if exporter.flags_in == "shell":
        assert arguments(flags, tmp_path) == [[word for flag in lines for word in shlex.split(flag)] for lines in flags]
    else:
        for lines in flags:
            assert_nothing_runs(lines, tmp_path)
