"""What was computed is kept: a full disk or an interruption costs no finished step; finished stages are not rerun."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from plop_dist.config.loading import load_config
from plop_dist.launch.rank import run_rank
from plop_dist.rundir.stages import Stages
from plop_dist.training.checkpoint import Checkpoints, fingerprint
from plop_dist.values.scores import Scores
from tests.cli.cases import assert_one_message, events, modules_of, plop_dist, results, write_case
from tests.models import save_tiny, tiny
from tests.training.cases import make_config, make_placement

NUM_SAMPLES = 8  # 4 steps of 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def truth(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The modules of an undisturbed run."""
    directory = tmp_path_factory.mktemp("truth")
    assert plop_dist("score", write_case(directory, model)).status == 0
    return modules_of(directory / "run")


def run_until(config: Path, step: int) -> None:
    """Score in this process and be interrupted right after this many steps."""

    def notify(kind: str, **fields: Any) -> None:
        if kind == "scoring" and fields["step"] == step:
            raise KeyboardInterrupt

    stages = Stages(load_config(config))
    stages.run_dir.prepare()
    with pytest.raises(KeyboardInterrupt):
        run_rank(stages, ["score"], notify)


@pytest.mark.parametrize("step", [1, 3, 4])
def test_an_interrupted_scoring_goes_on_with_equal_scores(
    model: Path, tmp_path: Path, truth: list[dict[str, Any]], step: int
) -> None:
    config = write_case(tmp_path, model)
    run_until(config, step)
    assert not (tmp_path / "run" / "scores.json").exists()
    outcome = plop_dist("score", config)
    assert outcome.status == 0, outcome.err
    resumed = [event for event in events(tmp_path / "run") if event["event"] == "resumed"]
    num_kept = 2 * min(step, 3)  # the last step always runs: it shows which weights nothing scores
    assert [(event["done"], event["total"]) for event in resumed] == [(num_kept, NUM_SAMPLES)]
    assert f"resumed: {num_kept} of 8 samples were scored before" in outcome.err
    assert modules_of(tmp_path / "run") == truth
    assert not (tmp_path / "run" / "progress").exists()


def test_progress_on_other_rows_or_another_estimate_is_not_mixed_in(model: Path, tmp_path: Path) -> None:
    config = write_case(tmp_path, model)
    run_until(config, 2)
    assert plop_dist("score", config, "data.template={answer} {question}").status == 0
    assert [event for event in events(tmp_path / "run") if event["event"] == "resumed"] == []


def test_a_damaged_progress_file_is_one_message_that_says_what_to_do(model: Path, tmp_path: Path) -> None:
    config = write_case(tmp_path, model)
    run_until(config, 2)
    (damaged,) = (tmp_path / "run" / "progress").rglob("*step-000001*")
    damaged.write_bytes(damaged.read_bytes()[:50])
    assert_one_message(plop_dist("score", config), damaged.name, "delete it and score again")
    damaged.unlink()
    assert plop_dist("score", config).status == 0


@pytest.mark.parametrize("name", ["rank-00000-step-000002.safetensors", "samples.safetensors", "scores.json"])
def test_a_full_disk_loses_no_finished_step(
    model: Path, tmp_path: Path, truth: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = write_case(tmp_path, model, estimator={"seed": 7, "num_directions": 8})
    assert plop_dist("run", config).status == 0
    before = results(tmp_path / "run")
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if f"/.{name}." in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        outcome = plop_dist("score", config, "estimator.seed=0")
    assert_one_message(outcome, name, "No space left on device", "free space")
    after = results(tmp_path / "run")
    assert after == before
    assert not list((tmp_path / "run").rglob(f".{name}.*"))  # no half-written file stays behind
    outcome = plop_dist("score", config, "estimator.seed=0")
    assert outcome.status == 0, outcome.err
    num_kept = 2 if name.startswith("rank") else 3
    assert f"resumed: {2 * num_kept} of 8 samples" in outcome.err
    assert modules_of(tmp_path / "run") == truth


def test_a_disk_that_is_full_from_the_beginning(model: Path, tmp_path: Path) -> None:
    config = write_case(tmp_path, model)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "events.jsonl").write_bytes(b"\n" * 2**20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # nothing more goes into this file, as on a full disk
    try:
        outcome = plop_dist("score", config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_message(outcome, "cannot write", "events.jsonl", "File too large", "free space")


@pytest.mark.slow
def test_finished_stages_are_kept_and_a_changed_key_reruns_with_the_reason(model: Path, tmp_path: Path) -> None:
    config = write_case(tmp_path, model)
    run_dir = tmp_path / "run"
    first = plop_dist("run", config)
    assert first.status == 0, first.err
    for stage in ("score", "place", "export"):
        assert f"{stage}: runs because it has not run yet" in first.err
    before = results(run_dir)
    times = {name: (run_dir / name).stat().st_mtime_ns for name in before if name != "report.html"}

    again = plop_dist("run", config)
    assert again.status == 0, again.err
    assert "runs because" not in again.err
    assert {name: (run_dir / name).stat().st_mtime_ns for name in times} == times

    changed = plop_dist("run", config, "placement.k=2")
    assert changed.status == 0, changed.err
    assert "score: done before, kept" in changed.err
    assert "place: runs because placement.k changed from 3 to 2" in changed.err
    assert "export: runs because placement.json changed" in changed.err
    assert len(json.loads((run_dir / "placement.json").read_text())["module_types"]) == 2
    assert results(run_dir)["scores.json"] == before["scores.json"]

    changed = plop_dist("run", config, "placement.k=2", "data.num_samples=6")
    assert "score: runs because data.num_samples changed from 200 to 6" in changed.err
    assert Scores.from_file(run_dir / "scores.json").data.num_samples == 6


@pytest.mark.slow
def test_a_placement_chosen_by_hand_is_kept_and_the_run_says_how_it_differs(model: Path, tmp_path: Path) -> None:
    config, run_dir = write_case(tmp_path, model), tmp_path / "run"
    assert plop_dist("run", config).status == 0
    assert plop_dist("place", run_dir, "k=1").status == 0
    outcome = plop_dist("run", config)
    assert f"as plop-dist place has chosen it, with k 1 (here 3); to place as configured here, delete {run_dir}" in (
        outcome.err
    )
    assert "export: runs because placement.json changed" in outcome.err
    assert len(json.loads((run_dir / "placement.json").read_text())["module_types"]) == 1
    (run_dir / "placement.json").unlink()
    outcome = plop_dist("run", config, "export.targets=[trl]")
    assert "chosen it" not in outcome.err
    outcome = plop_dist("run", config)
    assert "place: done before, kept\n" in outcome.err


def test_an_edited_data_file_and_a_deleted_result_rerun(model: Path, tmp_path: Path) -> None:
    config = write_case(tmp_path, model)
    assert plop_dist("run", config).status == 0
    (tmp_path / "run" / "placement.json").unlink()
    outcome = plop_dist("run", config)
    assert "score: done before, kept" in outcome.err
    assert "place: runs because placement.json is missing" in outcome.err
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text() + '{"question": "one more", "answer": "row"}\n')
    outcome = plop_dist("run", config)
    assert f"score: runs because {data} was edited or replaced" in outcome.err
    assert Scores.from_file(tmp_path / "run" / "scores.json").data.num_samples == 9


@pytest.mark.parametrize("content", ["{", '{"score": 3}', '{"score": {"inputs": [1], "outputs": 3}}'])
def test_damaged_notes_of_finished_stages_count_for_nothing(model: Path, tmp_path: Path, content: str) -> None:
    stages = Stages(load_config(write_case(tmp_path, model)))
    stages.run_dir.prepare()
    stages.run_dir.stages.write_text(content)
    assert stages.reason_to_run("score") == "it has not run yet"


def test_training_does_not_go_on_from_a_checkpoint_of_other_weights(model: Path, tmp_path: Path) -> None:
    config = make_config(shutil.copytree(model, tmp_path / "model"), tmp_path / "run")
    placement = make_placement(tiny("llama"))
    before = fingerprint(config, placement)
    assert fingerprint(config, placement) == before
    save_tiny("llama", tmp_path / "model", seed=1)
    assert fingerprint(config, placement) != before


@pytest.mark.parametrize(("name", "length"), [("rank-00000.pt", 100), ("complete.json", 10), ("rank-00000.pt", None)])
def test_training_goes_on_from_the_last_checkpoint_that_can_be_read(
    tmp_path: Path, name: str, length: int | None
) -> None:
    checkpoints = Checkpoints(tmp_path, "key")
    for step in (2, 4):
        checkpoints.save(step, {"weight": torch.full((3,), float(step))}, {"held_out_before": 1.5})
    path = tmp_path / "step-00000004" / name
    path.write_bytes(path.read_bytes()[:length]) if length else path.unlink()
    found = checkpoints.load_last()
    assert found is not None
    assert (found[0], found[1]["weight"].tolist(), found[2]) == (2, [2.0] * 3, {"held_out_before": 1.5})


def test_a_refused_command_leaves_the_configuration_of_the_results(model: Path, tmp_path: Path) -> None:
    config, run = write_case(tmp_path, model), tmp_path / "run"
    assert plop_dist("score", config).status == 0
    before = {name: (run / name).read_bytes() for name in ("config.yaml", "command.txt", "scores.json")}
    refused = plop_dist("score", config, "data.path=/nowhere.jsonl", "placement.k=5")
    assert_one_message(refused, "/nowhere.jsonl")
    assert {name: (run / name).read_bytes() for name in before} == before
    assert plop_dist("score", config, "placement.k=5").status == 0
    assert (run / "config.yaml").read_bytes() != before["config.yaml"]


def test_edited_held_out_rows_count_as_a_change(tmp_path: Path) -> None:
    rows = tmp_path / "held-out.jsonl"
    rows.write_text("{}")
    config = make_config(tmp_path, tmp_path / "run", train={"eval_path": str(rows)})
    placement = make_placement(tiny("llama"))
    before = fingerprint(config, placement)
    rows.write_text("{ }")
    assert fingerprint(config, placement) != before
