"""Numbers from files are numbers: what a log or a summary holds is parsed as what it must be, or said not to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plop_dist.errors import ScoresError
from plop_dist.rundir.layout import RunDir
from plop_dist.rundir.trained import read_trained
from plop_dist.rundir.training_log import parse_entry, read_log
from plop_dist.training.log import TrainingLog
from tests.rundir.test_stages import stages

GOOD = {"step": 3, "loss": 1.5, "grad_norm": 2, "nfn": {"q_proj": 0.9}, "time": 1.0}
BAD: tuple[Any, ...] = (
    {**GOOD, "step": "<a href=x>3</a>"},
    {**GOOD, "step": "3"},
    {**GOOD, "step": True},
    {**GOOD, "step": -1},
    {**GOOD, "step": 1.5},
    {**GOOD, "step": 10**400},
    {**GOOD, "step": None},
    {"loss": 1.0},
    {**GOOD, "loss": "1.5"},
    {**GOOD, "loss": [1]},
    {**GOOD, "loss": {"a": 1}},
    {**GOOD, "loss": 10**400},
    {**GOOD, "loss": False},
    {**GOOD, "nfn": "x"},
    {**GOOD, "nfn": [1]},
    {**GOOD, "nfn": {"q_proj": "javascript:x"}},
    {**GOOD, "nfn": {"q\u202eproj": 1.0}},
    {**GOOD, "a\x1b]0;x\x07": 1.0},
    [GOOD],
    "x",
    3,
    None,
)


@pytest.mark.parametrize("tree", BAD)
def test_a_line_that_is_not_what_it_must_be_is_counted_and_not_read(tmp_path: Path, tree: Any) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(tree)}\n")
    assert read_log(path) == ([GOOD], 1)


@pytest.mark.parametrize(
    "line", ['{"step": 1, "lo', "[" * 100_000, "\xff\xfe", '{"step": 1' + "0" * 5000 + "}", "\x00"]
)
def test_a_damaged_line_is_counted_too(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(f"{json.dumps(GOOD)}\n{line}".encode("latin-1"))
    assert read_log(path) == ([GOOD], 1)


def test_what_is_not_finite_is_left_out_and_the_last_entry_of_a_step_counts(tmp_path: Path) -> None:
    assert parse_entry('{"step": 1, "loss": NaN, "grad_norm": Infinity, "reward": null, "kl": 1e999}') == {"step": 1}
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": {loss}}}\n' for step, loss in ((1, 3), (2, 2), (1, 5))))
    assert read_log(path) == ([{"step": 1, "loss": 5}, {"step": 2, "loss": 2}], 0)
    assert read_log(tmp_path / "none.jsonl") == ([], 0)


def test_a_training_takes_over_a_log_with_odd_lines(tmp_path: Path) -> None:
    config = stages(tmp_path).config
    train = config.run_path / "train"
    train.mkdir(parents=True)
    lines = ['{"step": 1, "loss": 1.0}', '{"step": "5"}', '{"step": [1]}', "x", '{"step": 9, "loss": 1.0}']
    (train / "log.jsonl").write_text("\n".join(lines) + "\n")
    with TrainingLog(config, train, lambda kind, **fields: None) as log:
        log({"step": 2, "loss": 0.5})
    kept = (train / "log.jsonl").read_text().splitlines()
    assert kept[0] == lines[0]
    assert [json.loads(line)["step"] for line in kept] == [1, 2]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("num_steps", "3", "a valid integer"),
        ("num_steps", True, "a valid integer"),
        ("num_steps", -1, "greater than or equal to 0"),
        ("held_out_before", "1.0", "a valid number"),
        ("held_out_after", [1.0], "a valid number"),
        ("reward_last", {"a": 1}, "a valid number"),
        ("method", 3, "a valid string"),
        ("adapter", ["x"], "a valid string"),
        ("note", {}, "a valid string"),
        ("num_rows", "many", "a valid number"),
        ("job", "rm", "a valid dictionary"),
        ("job", {"script": 3}, "a valid string"),
    ],
)
def test_a_summary_is_refused_by_its_field(tmp_path: Path, field: str, value: Any, expected: str) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.train.mkdir()
    good = {"method": "sft", "num_steps": 3, "held_out_before": 2.0, "held_out_after": None, "other": [1]}
    run_dir.training_summary.write_text(json.dumps(good))
    trained = read_trained(run_dir)
    assert trained is not None
    assert trained.summary == good
    run_dir.training_summary.write_text(json.dumps({**good, field: value}))
    with pytest.raises(ScoresError, match=rf"summary\.json: {field}.*{expected}"):
        read_trained(run_dir)
