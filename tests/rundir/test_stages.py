"""A stage is done while all it depends on is as it was, from wherever one looks at it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plop_dist.config.loading import parse_config
from plop_dist.errors import RunDirError
from plop_dist.rundir.stages import Stages
from plop_dist.rundir.trained import read_trained, write_trained


def stages(directory: Path | str, **sections: Any) -> Stages:
    tree = {"run_dir": str(Path(directory) / "run"), "model": {"name_or_path": "m"}, "data": {"path": "rows.jsonl"}}
    return Stages(parse_config({**tree, **sections}))


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory in which scoring is done, noted with whole paths as Ray's workers do."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("{}\n")
    done = stages(tmp_path, data={"path": str(tmp_path / "rows.jsonl")})
    done.run_dir.prepare()
    done.run_dir.scores.write_text("{}")
    done.finish("score", ["scores.json"])
    return tmp_path


def test_the_same_files_by_another_path_are_no_change(finished: Path) -> None:
    assert stages(finished).reason_to_run("score") is None
    assert stages(".").reason_to_run("score") is None
    assert stages(finished).reason_to_run("place") == "it has not run yet"


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"data": {"path": "other.jsonl"}}, "data.path changed from '{}/rows.jsonl' to 'other.jsonl'"),
        ({"estimator": {"seed": 1}}, "estimator.seed changed from 0 to 1"),
        ({"placement": {"exclude": []}}, "exclude changed from ['lm_head'] to []"),
        ({"placement": {"k": 1}}, None),
    ],
)
def test_what_a_stage_depends_on_is_the_reason(finished: Path, sections: dict[str, Any], reason: str | None) -> None:
    assert stages(finished, **sections).reason_to_run("score") == (reason and reason.format(finished))


def test_an_edited_file_is_the_reason_as_it_was_when_the_run_began(finished: Path) -> None:
    begun = stages(finished)
    assert begun.reason_to_run("score") is None
    Path("rows.jsonl").write_text("{}\n{}\n")
    assert stages(finished).reason_to_run("score") == f"{finished / 'rows.jsonl'} was edited or replaced"
    begun.finish("score", ["scores.json"])  # it has read the file before
    assert stages(finished).reason_to_run("score") == f"{finished / 'rows.jsonl'} was edited or replaced"


def test_notes_that_hide_something_are_refused(finished: Path) -> None:
    notes = stages(finished).run_dir.stages
    notes.write_text(json.dumps({"score": {"inputs": {}, "outputs": ["a\x1b]0;x\x07"]}}))
    with pytest.raises(RunDirError, match=r"stages\.json: score\.outputs\.0: 'a.x1b\]0;x.x07' holds .x1b"):
        stages(finished).reason_to_run("score")


def test_a_training_belongs_to_the_placement_that_it_marked(tmp_path: Path) -> None:
    run_dir = stages(tmp_path).run_dir
    run_dir.prepare()
    assert read_trained(run_dir) is None
    run_dir.placement.write_text("1")
    write_trained(run_dir, {"method": "sft"})
    trained = read_trained(run_dir)
    assert trained is not None
    assert (trained.summary["method"], trained.is_of_placement) == ("sft", True)
    run_dir.placement.write_text("2")
    trained = read_trained(run_dir)
    assert trained is not None
    assert not trained.is_of_placement
