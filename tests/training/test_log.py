"""What training writes down as it goes: JSON lines always, and the loggers that the user names."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from plop_dist.errors import ConfigError, RunDirError
from plop_dist.training.log import TrainingLog
from tests.training.cases import make_config

ENTRIES = [{"step": 1, "loss": 2.5, "learning_rate": 0.1}, {"step": 2, "loss": 1.5, "nfn": {"v_proj": 0.75}}]


def quiet(*_: Any, **__: Any) -> None:
    pass


def write(directory: Path, *loggers: str) -> None:
    config = make_config("unused", directory, train={"loggers": list(loggers)})
    with TrainingLog(config, directory, quiet) as log:
        for entry in ENTRIES:
            log(entry)


def test_json_lines_are_always_written(tmp_path: Path) -> None:
    write(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [{key: line[key] for key in line if key != "time"} for line in lines] == ENTRIES


def test_a_run_that_goes_on_or_begins_again_replaces_what_it_repeats(tmp_path: Path) -> None:
    write(tmp_path)
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "lo')  # a kill in the middle of a line
    (tmp_path / "summary.json").write_text("{}")  # how another training ended
    with TrainingLog(make_config("unused", tmp_path), tmp_path, quiet) as resumed:
        resumed({"step": 2, "loss": 1.25})
        resumed({"step": 3, "loss": 1.0})
    assert not (tmp_path / "summary.json").exists()
    assert [json.loads(line).get("loss") for line in log.read_text().splitlines()] == [2.5, 1.25, 1.0]
    write(tmp_path)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2]


def test_the_terminal_shows_how_far_a_step_strays(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    with TrainingLog(make_config("unused", tmp_path), tmp_path, lambda kind, **fields: told.append(fields)) as log:
        log({"step": 1, "loss": 0.5, "reward": 0.25, "entropy": 1.5, "kl": 0.125, "clip_ratio/region_mean": 0.5})
        log({"step": 2, "loss": 0.5, "cispo_clip_ratio": 0.25, "sampling/sampling_logp_difference/max": 0.0625})
    assert [fields["note"] for fields in told] == [
        "loss 0.5000, reward 0.2500, entropy 1.5000, KL 0.1250, clipped 0.5000",
        "loss 0.5000, clipped 0.2500, sampler off by 0.0625",
    ]


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path, "tensorboard")
    found = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 2.5), (2, 1.5)]
    assert [(event.step, event.value) for event in found.Scalars("nfn/v_proj")] == [(2, 0.75)]


def test_wandb_is_sent_numbers_and_not_what_the_terminal_or_the_command_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["plop-dist", "run", "said-on-the-command-line"])
    write(tmp_path, "wandb")
    sent = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*") if path.is_file())
    assert b"nfn/v_proj" in sent
    for secret in (b"said-on-the-command-line", b"0123456789" * 4, str(Path(sys.argv[0]).resolve()).encode()):
        assert secret not in sent


def test_a_logger_that_cannot_begin_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise PermissionError("No API key configured.\nUse wandb login")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))  # stands in for wandb without an account
    with pytest.raises(ConfigError, match=r"'wandb' cannot begin a run \(PermissionError: No API key configured\)"):
        write(tmp_path, "wandb")


def test_a_folder_in_the_place_of_the_summary_is_named(tmp_path: Path) -> None:
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(RunDirError, match=r"cannot delete .*summary\.json: .*; delete it yourself"):
        write(tmp_path)
