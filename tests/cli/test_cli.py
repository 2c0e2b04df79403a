"""A user's mistake is exit status 2 and one message without traceback, and earlier results stay as they were."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plop_dist.cli import program
from tests.cli.cases import assert_one_message, modules_of, plop_dist, results, write_case
from tests.models import save_tiny

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a configuration whose run is done."""
    directory = tmp_path_factory.mktemp("finished")
    outcome = plop_dist("run", write_case(directory, model))
    assert outcome.status == 0, outcome.err
    return directory


@pytest.fixture
def case(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to make mistakes in."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path


def test_a_run_writes_everything_and_prints_the_types(finished: Path) -> None:
    assert {name.split("/")[0] for name in results(finished / "run")} == {
        "scores.json", "samples.safetensors", "placement.json", "exports", "report.html",
    }  # fmt: skip
    assert not list((finished / "run").glob("progress/*"))
    assert len(modules_of(finished / "run")) == 14
    placed = plop_dist("place", finished / "run")
    assert placed.status == 0
    assert all(name in placed.out for name in ("q_proj", "down_proj", "placement.json"))


def corrupt_weights(model: Path) -> None:
    whole = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def corrupt_header(model: Path) -> None:
    (model / WEIGHTS).write_bytes(b"\xff" * 1000)


def corrupt_config(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": ')


def lose_a_weight(model: Path) -> None:
    weights = load_file(model / WEIGHTS)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / WEIGHTS, {"format": "pt"})


def lose_the_config(model: Path) -> None:
    (model / "config.json").unlink()


def lose_the_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def give_a_larger_vocabulary(model: Path) -> None:
    shutil.copytree(save_tiny("llama", model / "small", vocab_size=64), model, dirs_exist_ok=True)


class Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


def pickle_code(model: Path) -> None:
    (model / WEIGHTS).unlink()
    torch.save({"model.embed_tokens.weight": Code()}, model / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (corrupt_weights, "the model cannot be loaded"),
        (corrupt_header, "the model cannot be loaded"),
        (corrupt_config, "cannot be loaded"),
        (lose_a_weight, "'model.layers.1.mlp.up_proj.weight'"),
        (lose_the_config, "has no config.json"),
        (lose_the_tokenizer, "there are no tokenizer files"),
        (give_a_larger_vocabulary, "its tokenizer gives the token id"),
        (pickle_code, "which are never unpickled"),
        (shutil.rmtree, "is not a directory"),
    ],
)
def test_a_broken_model(case: Path, model: Path, spoil: Callable[[Path], None], part: str) -> None:
    broken = case / "broken"
    shutil.copytree(model, broken)
    config = write_case(case, broken)
    spoil(broken)
    before = results(case / "run")
    assert_one_message(plop_dist("score", config), "model.name_or_path", str(broken), part)
    assert_one_message(plop_dist("run", config), str(broken))
    assert results(case / "run") == before
    assert not Path("executed").exists()


def test_check_sees_a_tokenizer_of_another_vocabulary(case: Path, model: Path) -> None:
    broken = case / "broken"
    shutil.copytree(model, broken)
    config = write_case(case, broken)
    give_a_larger_vocabulary(broken)
    assert_one_message(plop_dist("check", config), str(broken), "its tokenizer gives the token id")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["holds no rows"]),
        ("\n\n", ["holds no rows"]),
        ('{"question": "a", "answer": "b"}\n{"question": "a"}\n', ["row 2 has no column 'answer'", "question"]),
        ('{"question": "a", "answer": "b"}\n{"question": \n', ["line 2 is not JSON"]),
    ],
)
def test_bad_data(case: Path, model: Path, content: str, parts: list[str]) -> None:
    config = write_case(case, model)
    (case / "data.jsonl").write_text(content)
    before = results(case / "run")
    assert_one_message(plop_dist("score", config), "data.jsonl", *parts)
    assert results(case / "run") == before


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.num_sample=3", ["unknown key 'data.num_sample'", "Did you mean 'num_samples'?"]),
        ("paralel.tp=2", ["unknown key 'paralel'", "Did you mean 'parallel'?"]),
        ("parallel.backend=megatorn", ["parallel.backend", "megatorn"]),
        ("parallel.zero_stage=3", ["parallel.zero_stage is 3", "parallel.backend 'transformers' has no ZeRO"]),
        ("cluster.num_workers=3", ["cluster.num_workers is 3", "use 1 workers"]),
        ("data.path=nowhere.jsonl", ["data.path 'nowhere.jsonl' does not exist"]),
        ("data.text_field=question", ["data.text_field and data.template are given together"]),
        ("placement.k=0", ["placement.k", "greater than or equal to 1"]),
        ("num_samples", ["is not key=value"]),
    ],
)
def test_a_bad_key_or_value(case: Path, model: Path, override: str, parts: list[str]) -> None:
    config = write_case(case, model)
    before = results(case / "run")
    for command in ("score", "run"):
        assert_one_message(plop_dist(command, config, override), *parts)
    assert results(case / "run") == before


def test_k_larger_than_the_number_of_types(case: Path, finished: Path) -> None:
    before = results(case / "run")
    assert_one_message(plop_dist("place", case / "run", "k=99"), "99", "7")
    outcome = plop_dist("run", finished / "config.yaml", f"run_dir={case / 'run'}", "placement.k=99")
    assert_one_message(outcome, "99", "7")
    assert results(case / "run") == before


def test_a_layout_that_is_not_the_launcher_s(case: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_case(case, model)
    before = results(case / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    assert_one_message(plop_dist("score", config), "parallel.dp (1) = 1, but 2 rank(s) were started")
    assert results(case / "run") == before


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_weights_of_one_module_are_named_and_left_out(case: Path, model: Path, bad: float) -> None:
    spoilt = case / "spoilt"
    shutil.copytree(model, spoilt)
    weights = load_file(spoilt / WEIGHTS)
    fqn = "model.layers.1.mlp.down_proj"
    weights[f"{fqn}.weight"][3, 5] = bad
    save_file(weights, spoilt / WEIGHTS, {"format": "pt"})
    outcome = plop_dist("score", write_case(case, spoilt))
    assert_one_message(outcome, f"'{fqn}'", "NaN or infinity", "the other 13 modules")
    found = json.loads((case / "run" / "scores.json").read_text())
    assert fqn not in [module["fqn"] for module in found["modules"]]
    assert [(entry["fqn"], entry["reason"]) for entry in found["left_out"]] == [(fqn, "non_finite_weights")]
    placed = plop_dist("place", case / "run")
    assert placed.status == 0, placed.err


def test_a_run_directory_that_cannot_be_written(case: Path, model: Path) -> None:
    blocked = case / "file"
    blocked.write_text("not a directory")
    config = write_case(case, model)
    outcome = plop_dist("score", config, f"run_dir={blocked / 'run'}")
    assert_one_message(outcome, f"run_dir '{blocked / 'run'}' cannot be written", "choose another run_dir")
    assert "baselines" not in outcome.err  # said before anything is computed
    assert blocked.read_text() == "not a directory"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["place", "nowhere"], ["nowhere", "run plop-dist score first"]),
        (["export", "nowhere", "--to", "peft"], ["nowhere", "run plop-dist place first"]),
        (["report", "nowhere"], ["nowhere"]),
        (["score", "nowhere.yaml"], ["Config file 'nowhere.yaml' does not exist"]),
    ],
)
def test_a_path_that_leads_nowhere(arguments: list[str], parts: list[str]) -> None:
    assert_one_message(plop_dist(*arguments), *parts)


def test_an_unknown_target_command_and_option(finished: Path) -> None:
    before = results(finished / "run")
    assert_one_message(plop_dist("export", finished / "run", "--to", "pefft"), "'pefft'", "Did you mean 'peft'?")
    for arguments in (["scor"], ["place", finished / "run", "--sweeep"], ["export", finished / "run"]):
        outcome = plop_dist(*arguments)
        assert outcome.status == 2
        assert "Traceback" not in outcome.err
        assert outcome.err.count("Error") == 1, outcome.err
    assert results(finished / "run") == before


def test_a_command_s_own_exit_status_is_the_process_s(case: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plop_dist.launch.jobs.submit_job", lambda _config, _address, **_: 1)
    assert plop_dist("submit", write_case(case, model)).status == 1
    assert plop_dist("--help").status == 0


def test_an_interrupt_ends_without_a_traceback(case: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("plop_dist.launch.pipeline.score", interrupt)
    outcome = plop_dist("score", write_case(case, model))
    assert outcome.status == 130
    assert "Traceback" not in outcome.err


def test_something_unforeseen_is_status_1_and_names_the_rank(
    case: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the sky fell")

    monkeypatch.setattr("plop_dist.measure.run.score_model", fail)
    before = results(case / "run")
    outcome = plop_dist("score", write_case(case, model))
    assert outcome.status == 1
    assert outcome.err.strip().endswith("error: rank 0: score failed: RuntimeError: the sky fell")
    assert results(case / "run") == before


@pytest.mark.parametrize("interrupt", [SystemExit(143), KeyboardInterrupt()])
def test_what_breaks_while_an_interrupt_is_answered_does_not_hide_it(interrupt: BaseException) -> None:
    """A broken pipe would be status 1 without a word: click takes it for a reader of standard output that left."""

    def place(run_dir: Path) -> None:
        try:
            raise interrupt
        finally:
            raise BrokenPipeError(errno.EPIPE, "the process behind it has ended")

    with pytest.raises(type(interrupt)) as raised:
        program._with_talk(place)(run_dir=Path(), quiet=True, verbose=False, log_file=None)
    assert raised.value is interrupt


def test_a_thread_that_never_ends_does_not_keep_a_command_from_ending() -> None:
    stuck = "import threading, time; threading.Thread(target=time.sleep, args=(600,)).start()"
    script = f"{stuck}; from plop_dist import cli; cli._leave(3)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 3
