"""Scores and placements survive their files; malformed, truncated or edited ones are one clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import plop_dist
from plop_dist.errors import ScoresError
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Scores
from tests.choose.cases import make_scores


def test_round_trip(tmp_path: Path) -> None:
    scores = make_scores()
    scores.to_file(tmp_path / "scores.json")
    read = Scores.from_file(tmp_path / "scores.json")
    assert read == scores
    assert read.samples is not None
    assert scores.samples is not None
    np.testing.assert_array_equal(read.samples.gain_total, scores.samples.gain_total)
    placement = plop_dist.place(read)
    assert placement == plop_dist.place(scores)
    placement.to_file(tmp_path / "placement.json")
    assert Placement.from_file(tmp_path / "placement.json") == placement


def change(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(tree: dict[str, Any]) -> None:
        for part in path[:-1]:
            tree = tree[part]
        tree[path[-1]] = value

    return apply


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (change("schema", value="plop-dist/scores/9"), r"schema is 'plop-dist/scores/9'"),
        (change("modules", value=[]), "modules: "),
        (change("modules", 2, "nfn", value="high"), r"modules\.2\.nfn: .*'high'"),
        (change("modules", 2, "nfn", value=0.1), r"modules\.2 .*nfn is 0\.1, but gain / baseline"),
        (change("modules", 1, "baseline", value=0), r"modules\.1\.baseline"),
        (change("modules", 1, "in_features", value=-4), r"modules\.1\.in_features"),
        (change("modules", 1, "fqn", value="model.layers.0.self_attn.q_proj"), "is listed twice"),
        (change("types", 0, "type", value="x_proj"), "types and modules disagree about"),
        (change("types", 0, "num_modules", value=99), "says 99 modules"),
        (change("types", 0, "nfn", value=0.01), "the file was edited"),
        (change("types", 0, "nfn_ci95", value=[1]), r"types\.0\.nfn_ci95"),
        (change("model", value={}), r"model\.name_or_path"),
        (change("versions", "torch", value="\ud83d"), r"holds .ud83d, half of a surrogate pair"),
        (change("model", "note", value=["\udc00"]), "not whole Unicode"),
        (
            change("modules", 1, "in_features", value=10**30),
            r"modules\.1\.in_features: .*less than or equal to 67108864",
        ),
        (change("types", 0, "nfn_ci95", value=[0.1, float("nan")]), r"types\.0\.nfn_ci95\.1: .*finite"),
    ],
)
def test_edited_scores_are_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], None], match: str) -> None:
    path = tmp_path / "scores.json"
    make_scores(with_samples=False).to_file(path)
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(ScoresError, match=match) as caught:
        Scores.from_file(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_status == 2


def scale_a_gain(tree: dict[str, Any]) -> None:
    # consistent in itself: only the sums beside it tell
    module = tree["modules"][0]
    entry = next(item for item in tree["types"] if item["type"] == module["type"])
    entry["nfn"] += module["nfn"] / entry["num_modules"]
    module["gain"] *= 2
    module["nfn"] *= 2


def drop_a_type(tree: dict[str, Any]) -> None:
    name = tree["types"].pop()["type"]
    tree["modules"] = [module for module in tree["modules"] if module["type"] != name]


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (scale_a_gain, r"modules\.0 .* but samples\.safetensors gives .*the file was edited"),
        (change("modules", 3, "num_tokens", value=10**6), r"modules\.3 .* num_tokens 1000000"),
        (drop_a_type, "disagree about module .*, which only one of them has"),
    ],
)
def test_scores_and_their_sums_must_agree(tmp_path: Path, edit: Callable[[dict[str, Any]], None], match: str) -> None:
    path = tmp_path / "scores.json"
    make_scores().to_file(path)
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(ScoresError, match=match):
        Scores.from_file(path)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (change("module_types", value=["q_proj"]), "modules and module_types disagree about"),
        (lambda tree: tree["modules"].append(tree["modules"][0]), "listed twice"),
        (lambda tree: tree["modules"].pop(0), r"num_trainable_parameters is 294,912, but .* have 262,144"),
        (change("rank", value=8), r"num_trainable_parameters is 294,912, but .* have 147,456"),
        (change("rank_pattern", value={"q_proj": 4}), "rank_pattern 'q_proj' is no chosen type or module"),
        (change("alpha", value=1e300), r"alpha: expected a number less than"),
        (change("scores", value="\x00"), "which no name may hold"),
        (change("scores", value="."), r"scores is '\.', expected the name of a file"),
        (change("policy", "policy", value="\udfff"), "not whole Unicode"),
    ],
)
def test_edited_placements_are_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], None], match: str) -> None:
    scores, path = make_scores(), tmp_path / "placement.json"
    scores.to_file(tmp_path / "scores.json")
    plop_dist.place(scores).to_file(path)
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(ScoresError, match=match):
        Placement.from_file(path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is not whole JSON"),
        (b'{"schema": "plop-dist/scores/1", "mod', "is not whole JSON: .* line 1 column"),
        (b"[1, 2]", "holds a list"),
        (b"[" * 100_000, "is not whole JSON|nested"),
        (b"\xff\xfe\x00", "cannot be read"),
        (
            b'{"schema": "plop-dist/scores/1", "versions": {"torch": "\\ud800"}}',
            r"holds .ud800, half of a surrogate pair",
        ),
        (b'["\\\\ud800", "\\ud83d\\ude00"]', "holds a list"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "scores.json"
    path.write_bytes(content)
    with pytest.raises(ScoresError, match=match):
        Scores.from_file(path)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        ({"gain_total": lambda array: np.where(array == array[0, 0], np.nan, array)}, r"modules\.0 .*gives .* nan"),
        ({"gain_total": lambda array: array.astype(np.int64)}, "found gain_total of int64"),
        ({"num_tokens": lambda array: array[:, 1:]}, r"expected sums of shape \(21, 24\)"),
        ({"sample_ids": lambda array: array[None]}, "one row of sample_ids"),
        ({"fqns": lambda fqns: (fqns[0], *fqns[:-1])}, "distinct paths"),
        ({"fqns": lambda fqns: ([1], *fqns[1:])}, "distinct paths"),
    ],
)
def test_odd_sums_are_refused(tmp_path: Path, edit: dict[str, Callable[[Any], Any]], match: str) -> None:
    scores = make_scores()
    assert scores.samples is not None
    odd = {name: change_(getattr(scores.samples, name)) for name, change_ in edit.items()}
    scores.with_samples(replace(scores.samples, **odd)).to_file(tmp_path / "scores.json")
    with pytest.raises(ScoresError, match=match):
        Scores.from_file(tmp_path / "scores.json")


def test_files_from_before_there_were_options_are_read(tmp_path: Path) -> None:
    make_scores().to_file(tmp_path / "scores.json")
    placement = plop_dist.place(Scores.from_file(tmp_path / "scores.json"))
    assert "options" not in placement.policy
    placement.to_file(tmp_path / "placement.json")
    assert plop_dist.place(placement.source, **Placement.from_file(tmp_path / "placement.json").policy) == placement


def test_broken_samples_and_foreign_placement_are_refused(tmp_path: Path) -> None:
    scores = make_scores()
    scores.to_file(tmp_path / "scores.json")
    plop_dist.place(scores).to_file(tmp_path / "placement.json")
    make_scores({"z_proj": 1.0, "y_proj": 2.0}, name="other").to_file(tmp_path / "scores.json")
    with pytest.raises(ScoresError, match="the placement is for another model"):
        Placement.from_file(tmp_path / "placement.json")
    (tmp_path / "samples.safetensors").write_bytes(b"\x00" * 7)
    with pytest.raises(ScoresError, match="cannot be read as safetensors"):
        Scores.from_file(tmp_path / "scores.json")
