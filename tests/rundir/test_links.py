"""Nothing inside a run directory is read or written through a link, and what is written has the mode of the umask."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from pathlib import Path

import pytest

import plop_dist
from plop_dist.errors import RunDirError
from plop_dist.exporters.write import write_export
from plop_dist.launch.cluster import close_token
from plop_dist.rundir.attempts import begin_attempt, records_of
from plop_dist.rundir.events import EventWriter
from plop_dist.rundir.layout import RunDir
from plop_dist.rundir.progress import ProgressLog
from plop_dist.values.files import append_line, make_folder, write_json, write_text
from plop_dist.values.placement import Placement
from tests.choose.cases import make_scores
from tests.cli.cases import assert_one_message
from tests.cli.cases import plop_dist as command


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with something in every place."""
    run = tmp_path_factory.mktemp("finished") / "run"
    scores = make_scores(with_samples=False)
    scores.to_file(run / "scores.json")
    plop_dist.place(scores).to_file(run / "placement.json")
    for name in ("config.yaml", "command.txt", "train/log.jsonl", "train/adapter/x", "progress/k/x", "ray/x/y"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("placement: {k: 3}\n" if name == "config.yaml" else "")
    for done in (command("export", run, "--to", "peft"), command("report", run)):
        assert done.status == 0, done.err
    EventWriter(run / "events.jsonl")("status", text="x")
    return run


PLACES = (
    "scores.json", "placement.json", "config.yaml", "command.txt", "events.jsonl", "report.html", "exports",
    "exports/peft", "exports/peft/adapter_config.json", "train", "train/log.jsonl", "train/adapter", "progress",
    "progress/k", "ray",
)  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_a_link_in_any_place_is_refused_by_every_command(finished: Path, tmp_path: Path, name: str) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(finished, run)
    shutil.move(run / name, outside)
    (run / name).symlink_to(outside)
    before = contents(outside)
    for arguments in (["place", run], ["export", run, "--to", "trl"], ["report", run], ["targets", run]):
        assert_one_message(command(*arguments), f"{run / name} is a symbolic link", "delete the link")
    with pytest.raises(RunDirError, match="is a symbolic link"):
        RunDir(run).prepare()
    assert contents(outside) == before


def contents(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in (path, *path.rglob("*")) if file.is_file()}


def test_a_run_directory_may_be_a_link_and_a_logger_keep_its_own(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/train/wandb/run-1").mkdir(parents=True)
    (tmp_path / "run/train/wandb/latest-run").symlink_to("run-1")
    (tmp_path / "latest").symlink_to("run")
    outcome = command("place", tmp_path / "latest")
    assert outcome.status == 0, outcome.err
    RunDir(tmp_path / "latest").prepare()


def test_each_writer_refuses_a_link_by_itself(finished: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    placement = Placement.from_file(finished / "placement.json")
    for name in ("exports", "progress", "ray"):
        (tmp_path / name).symlink_to(outside)
    with pytest.raises(RunDirError, match="exports is a symbolic link"):
        write_export(placement, "peft", tmp_path / "exports", engine=None, widen=False)
    with pytest.raises(RunDirError, match="progress is a symbolic link"):
        ProgressLog(tmp_path, "k", 0).write(0, make_scores().samples)  # type: ignore[arg-type]
    with pytest.raises(RunDirError, match="ray is a symbolic link"):
        begin_attempt(records_of(RunDir(tmp_path), "id"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").symlink_to(outside)
    with pytest.raises(RunDirError, match="b is a symbolic link"):
        make_folder(tmp_path / "a" / "b" / "c", tmp_path)
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "dangling", "second name", "pipe", "folder"])
def test_what_is_no_file_of_its_own_is_not_appended_to(tmp_path: Path, kind: str) -> None:
    victim, path = tmp_path / "victim", tmp_path / "events.jsonl"
    victim.write_text("mine")
    if kind in ("link", "dangling"):
        path.symlink_to(victim if kind == "link" else tmp_path / "nothing")
    elif kind == "second name":
        path.hardlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(RunDirError, match=r"events\.jsonl"):
        EventWriter(path)("status", text="x")
    assert victim.read_text() == "mine"
    assert not (tmp_path / "nothing").exists()


def test_a_link_is_replaced_by_what_is_written_whole(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "placement.json"
    victim.write_text("mine")
    path.symlink_to(victim)
    write_json(path, {})
    assert (path.is_symlink(), victim.read_text()) == (False, "mine")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o007, 0o002])
def test_the_umask_says_who_may_read(tmp_path: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        write_text(tmp_path / "a" / "whole", "x")
        write_text(tmp_path / "a" / "whole", "y")
        append_line(tmp_path / "a" / "lines", "x")
        make_folder(tmp_path / "b" / "c", tmp_path)
    finally:
        os.umask(previous)
    for name, mode in (("a/whole", 0o666), ("a/lines", 0o666), ("a", 0o777), ("b/c", 0o777)):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode & ~umask, name
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["lines", "whole"]


def test_rays_token_is_closed_before_ray_starts_and_said_to_have_been_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    token = tmp_path / ".ray" / "auth_token"
    with caplog.at_level(logging.WARNING, logger="plop_dist"):
        close_token()
        assert not token.exists()
        close_token(make=True)
        first = token.read_text()
        close_token(make=True)
    assert len(first) >= 32
    assert (token.read_text(), mode_of(token), caplog.text) == (first, 0o600, "")
    for mode in (0o644, 0o640, 0o604):
        token.chmod(mode)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="plop_dist"):
            close_token()
        assert (mode_of(token), token.read_text()) == (0o600, first)
        assert f"{token} could be read by other users (mode 0{mode:o})" in caplog.text
        assert first not in caplog.text


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
