"""What a configuration takes from the environment never reaches a run directory, and is followed in none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from plop_dist.config.loading import load_config
from plop_dist.errors import ConfigError
from plop_dist.rundir.attempts import read_records, write_record
from plop_dist.values.interpolation import literal, mark_calls
from tests.cli.cases import assert_one_message, plop_dist, write_case
from tests.models import save_tiny

SECRET = "Zk3Qx9Lm7Wp2Rt5V"
REFERENCE = "${oc.env:HIDDEN_PART}"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIDDEN_PART", SECRET)
    monkeypatch.setenv("NUMBER_OF", "2")


def write(directory: Path, text: str, name: str = "given.yaml") -> Path:
    base = "run_dir: run\nmodel: {name_or_path: m}\ndata: {path: rows.jsonl}\n"
    tree = {**yaml.safe_load(base), **yaml.safe_load(text)}
    (directory / name).write_text(yaml.safe_dump(tree))
    return directory / name


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A configuration whose model and data lie below a folder that only the environment names, and its run."""
    directory = tmp_path_factory.mktemp("case")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIDDEN_PART", SECRET)
        patch.setenv("NUMBER_OF", "2")
        patch.chdir(directory)
        folder = directory / SECRET
        folder.mkdir()
        (directory / "model").mkdir()
        model = save_tiny("llama", directory / "model")
        shutil.move(model, folder / "tiny")
        write_case(folder, folder / "tiny")
        tree = yaml.safe_load((folder / "config.yaml").read_text())
        tree["run_dir"] = "run"
        tree["model"]["name_or_path"] = f"{directory}/{REFERENCE}/tiny"
        tree["data"]["path"] = f"{directory}/{REFERENCE}/data.jsonl"
        tree["data"]["num_samples"] = "${oc.decode:${oc.env:NUMBER_OF}}"
        tree["placement"] = {"k": "${oc.env:NUMBER_OF}"}
        tree["train"] = {"data_path": "${data.path}"}
        (directory / "given.yaml").write_text(yaml.safe_dump(tree))
        outcome = plop_dist("run", directory / "given.yaml")
        assert outcome.status == 0, outcome.err
    return directory, directory / "run"


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_run_keeps_references_and_never_values(finished: tuple[Path, Path]) -> None:
    directory, run = finished
    found = contents(run)
    assert {
        "config.yaml",
        "command.txt",
        "scores.json",
        "placement.json",
        "stages.json",
        "events.jsonl",
        "report.html",
    } <= set(found)
    assert [name for name, content in found.items() if SECRET.encode() in content] == []
    kept = yaml.safe_load(found["config.yaml"])
    assert kept["data"]["path"] == kept["train"]["data_path"] == f"{directory}/{REFERENCE}/data.jsonl"
    assert kept["data"]["num_samples"] == "${oc.decode:${oc.env:NUMBER_OF}}"
    assert json.loads(found["scores.json"])["model"]["name_or_path"] == f"{directory}/{REFERENCE}/tiny"
    assert json.loads(found["placement.json"])["policy"]["k"] == 2


@pytest.mark.slow
def test_what_is_done_is_known_again_and_another_value_is_a_change(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, run = finished
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    monkeypatch.chdir(tmp_path)
    again = plop_dist("run", directory / "given.yaml")
    assert again.status == 0, again.err
    assert contents(copy)["events.jsonl"] == contents(run)["events.jsonl"]
    shutil.copytree(directory / SECRET, directory / "elsewhere0", dirs_exist_ok=True)
    monkeypatch.setenv("HIDDEN_PART", "elsewhere0")
    other = plop_dist("run", directory / "given.yaml")
    assert other.status == 0, other.err
    assert "refers to changed" in other.err
    assert "elsewhere0" not in (copy / "stages.json").read_text()


def test_a_stored_configuration_is_used_as_far_as_it_says_what_is_needed(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished[1], run)
    assert_one_message(plop_dist("place", run), "config.yaml: placement.k is ${oc.env:NUMBER_OF}", "give placement.k=")
    for command in (["place", run, "k=1"], ["export", run, "--to", "peft"], ["report", run]):
        outcome = plop_dist(*command)
        assert outcome.status == 0, outcome.err
    for command in ("run", "score", "check"):
        outcome = plop_dist(command, run / "config.yaml")
        assert_one_message(outcome, "which is not followed in a configuration that a run has left behind")
        assert SECRET not in outcome.err + outcome.out


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("model.name_or_path", REFERENCE),
        ("data.path", f"prefix/{REFERENCE}/rows"),
        ("data.path", "${oc.env:${oc.env:NAME,HIDDEN_PART}}"),
        ("data.template", "${oc.decode:${oc.env:HIDDEN_PART}}"),
        ("train.data_path", "${model.name_or_path}"),
        ("placement.exclude", [REFERENCE]),
        ("placement.options", {"code": REFERENCE}),
        ("run_dir", REFERENCE),
    ],
)
def test_a_foreign_configuration_follows_nothing(tmp_path: Path, key: str, text: Any) -> None:
    run = tmp_path / "theirs"
    run.mkdir()
    (run / "stages.json").write_text("{}")
    section, _, name = key.rpartition(".")
    tree: dict[str, Any] = {section: {name: text}} if section else {name: text}
    base: dict[str, Any] = {"model": {"name_or_path": REFERENCE}, "data": {"path": "rows.jsonl"}}
    for part, fields in tree.items():
        base[part] = {**base.get(part, {}), **fields} if isinstance(fields, dict) else fields
    (run / "config.yaml").write_text(yaml.safe_dump(base))
    with pytest.raises(ConfigError) as raised:
        load_config(run / "config.yaml")
    assert "is not followed" in str(raised.value)
    assert SECRET not in str(raised.value)
    (run / "stages.json").unlink()
    if key.startswith("placement"):
        with pytest.raises(ConfigError, match="explained by it later"):
            load_config(run / "config.yaml")
        return
    config = load_config(run / "config.yaml")
    assert SECRET in str(config.value_of(key))
    assert SECRET not in json.dumps(config.stored()) + config.stored_yaml()
    (tmp_path / "again.yaml").write_text(config.stored_yaml())
    assert load_config(tmp_path / "again.yaml") == config


def test_an_override_of_the_users_is_followed_over_a_stored_configuration(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "stages.json").write_text("{}")
    write(run, f"data: {{path: '{REFERENCE}'}}", "config.yaml")
    config = load_config(run / "config.yaml", ["data.path=${oc.env:HIDDEN_PART}/rows"])
    assert config.data.path == f"{SECRET}/rows"
    assert config.stored()["data"]["path"] == f"{REFERENCE}/rows"


def test_a_text_that_only_looks_like_a_reference_stays_itself(tmp_path: Path) -> None:
    for text in ("${oc.env:HIDDEN_PART}", "a${b", "\\${x}", "$", "{x}", "\\\\${y}"):
        file = write(tmp_path, "{}")
        tree = yaml.safe_load(file.read_text())
        tree["data"]["template"] = literal(text) + " {q}"
        file.write_text(yaml.safe_dump(tree))
        config = load_config(file)
        assert config.data.template == text + " {q}"
        assert config.references == {}
        (tmp_path / "again.yaml").write_text(config.stored_yaml())
        assert load_config(tmp_path / "again.yaml") == config


def test_calls_are_told_from_keys() -> None:
    for text in ("${a}", "${a.b}:c", "{x}: ${a}", "\\${oc.env:X}", "a:b"):
        assert mark_calls(text) == text
    for text in ("${a:b}", "x${a}${b:${c}}", "\\\\${oc.env:X}", "${${a}:b}"):
        assert "${" not in mark_calls(text).replace("\\${", "")


def test_errors_of_ranks_are_kept_without_values_and_secrets(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, f"data: {{path: '{REFERENCE}/rows'}}"))
    error = ValueError(f"{SECRET}/rows is not there; https://me:pw123456@host/x; token=abcdefgh")
    write_record(tmp_path, 0, error, config.hide)
    (record,) = read_records(tmp_path)
    assert record["message"] == f"{REFERENCE}/rows is not there; https://[redacted]@host/x; token=[redacted]"
    assert SECRET not in (tmp_path / "error-rank-0.json").read_text()


@pytest.mark.parametrize(
    "key", ["run_dir", "model.name_or_path", "model.checkpoint", "data.path", "train.eval_path", "cluster.address"]
)
def test_no_key_and_no_argument_holds_a_secret(tmp_path: Path, key: str) -> None:
    file = write(tmp_path, "{}")
    for text in (
        f"https://{SECRET}@host/x",
        f"https://host/x?sig={SECRET}",
        f"u:{SECRET}@host:1",
        f"x/hf_{SECRET}{SECRET}",
    ):
        with pytest.raises(ConfigError, match=f"{key} holds .*redacted.*environment") as raised:
            load_config(file, [f"{key}={text}"])
        assert SECRET not in str(raised.value)
    for arguments in (
        ["check", file, f"{key}=https://host/x?token={SECRET}"],
        ["submit", file, "--address", f"http://{SECRET}@h:1"],
    ):
        outcome = plop_dist(*arguments)
        assert_one_message(outcome, "the argument '", "environment")
        assert SECRET not in outcome.err


def test_a_reference_in_a_url_is_the_way_to_give_a_secret(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, "data: {path: 'https://${oc.env:HIDDEN_PART}@host/x?token=${oc.env:HIDDEN_PART}'}")
    )
    assert SECRET in config.data.path
    assert SECRET not in config.stored_yaml()
