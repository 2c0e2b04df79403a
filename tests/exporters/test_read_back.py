"""Each target's own files are read back as the placement that they were written from, and others as what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from plop_dist.errors import ConfigError, ExportError, PlopError
from plop_dist.exporters import exporter as exporter_module
from plop_dist.exporters.diff import difference
from plop_dist.exporters.exporter import find_exporter
from plop_dist.exporters.read_back import read_export
from plop_dist.registry import EXPORTERS
from plop_dist.values.placement import Placement
from tests.exporters.cases import llama_projections, place, projection, scores_of
from tests.exporters.test_contract import placements

LLAMA = scores_of([*llama_projections(), projection("lm_head", 32, 96)])


def written(directory: Path, placement: Placement, name: str, engine: str) -> list[Path]:
    export = find_exporter(name).export(placement, engine=engine)
    for file, text in export.files.items():
        path = directory / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return [directory / name / file for file in export.files]


@pytest.mark.parametrize("name", EXPORTERS.own)
def test_what_is_exported_is_read_back_without_a_difference(name: str, tmp_path: Path) -> None:
    num_read = 0
    for number, placement in enumerate(placements()):
        for engine in find_exporter(name).engines:
            try:
                files = written(tmp_path / f"{number}-{engine}", placement, name, engine)
            except ExportError:
                continue
            for file in files:
                found = difference(placement, read_export(file, placement))
                assert (found.only_placement, found.only_config) == ((), ()), (file, placement.module_types)
                assert found.both == tuple(sorted(placement.modules, key=found.both.index))
                num_read += 1
    assert num_read >= 3


@pytest.mark.parametrize("name", EXPORTERS.own)
def test_a_file_by_any_name_is_recognised_or_its_target_named(name: str, tmp_path: Path) -> None:
    types = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    placement = place(LLAMA, types, rank=16, alpha=32)
    engine = find_exporter(name).engines[0]
    for file in written(tmp_path, placement, name, engine):
        moved = tmp_path / f"mine{file.suffix}"
        moved.write_text(file.read_text())
        named = difference(placement, read_export(moved, placement, name))
        assert (named.only_placement, named.only_config, named.rank_config) == ((), (), 16)
        recognised = difference(placement, read_export(moved, placement))
        assert recognised.only_placement == recognised.only_config == ()


def test_what_differs_is_said_in_every_way_of_matching(tmp_path: Path) -> None:
    placement = place(LLAMA, ["v_proj", "o_proj"])
    tune = tmp_path / "tune.yaml"
    switches = "lora_attn_modules: [v_proj, q_proj], apply_lora_to_mlp: true"
    tune.write_text(f"model: {{{switches}, lora_rank: 8, lora_alpha: 16}}\n")
    found = difference(placement, read_export(tune, placement))
    assert {name: row for name, *row in found.rows()} == {
        "q_proj": [0, 0, 2], "v_proj": [2, 0, 0], "o_proj": [0, 2, 0], "gate_proj": [0, 0, 2], "up_proj": [0, 0, 2],
        "down_proj": [0, 0, 2],
    }  # fmt: skip
    assert found.rank_config == 8
    fused = tmp_path / "peft.yaml"
    fused.write_text("{type: lora, target_modules: [linear_qkv, linear_fc3], dim: 4, alpha: 8}\n")
    found = difference(placement, read_export(fused, placement))
    assert {name: row for name, *row in found.rows()} == {
        "q_proj": [0, 0, 2], "k_proj": [0, 0, 2], "v_proj": [2, 0, 0], "o_proj": [0, 2, 0],
    }  # fmt: skip
    assert found.num_parameters_config == 2 * 4 * (32 + 32 + 16 + 16)  # one adapter for the rows of all three
    assert found.unmatched == ("linear_fc3",)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "{x: 1}", "no target's keys; name the target with --as"),
        ("a.yaml", "[1]", "holds list"),
        ("a.yaml", "{", "cannot be read"),
        ("a.json", "{", "cannot be read"),
        ("a.py", "x = 1", "there is no call in it"),
        ("a.args", "words alone", "there are no --flags in it"),
        ("a.yaml", "{tuner_type: lora, target_modules: [a]}", "cannot be read as ms-swift's|neither"),
        (
            "a.yaml",
            "{use_peft: true, lora_r: x, lora_alpha: 2, lora_target_modules: [a]}",
            "cannot be read as trl's",
        ),
    ],
)
def test_a_file_that_says_nothing_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_export(tmp_path / name, place(LLAMA, ["v_proj"]))


def test_another_package_s_target_that_cannot_read_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = find_exporter("peft")
    fields = {name: getattr(peft, name) for name in ("summary", "engines", "keys", "matching", "limits", "flags_in")}
    quilt = SimpleNamespace(name="quilt", export=peft.export, **fields)
    monkeypatch.setattr(exporter_module, "load", lambda kind, name: quilt)
    (tmp_path / "a.json").write_text(json.dumps({"r": 1}))
    with pytest.raises(ConfigError, match="export target 'quilt' of another package cannot read its files back"):
        read_export(tmp_path / "a.json", place(LLAMA, ["v_proj"]), "quilt")


@pytest.mark.parametrize("name", EXPORTERS.own)
def test_a_number_that_no_float_holds_is_one_message_or_is_not_read(name: str, tmp_path: Path) -> None:
    placement = place(scores_of(llama_projections(2)), ["q_proj", "k_proj", "v_proj", "o_proj"], alpha=32)
    messages = []
    for path in written(tmp_path, placement, name, find_exporter(name).engines[0]):
        text = path.read_text()
        for number in set(re.findall(r"(?<=[ :=])\d+\b", text)):
            path.write_text(text.replace(number, "9" * 400))
            try:
                read_export(path, placement, name)
            except PlopError as error:
                messages.append(str(error))
    assert all(str(tmp_path) in message for message in messages)
