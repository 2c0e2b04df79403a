"""What a user or a program asks the command line: a key, the version, this machine, one JSON object per command."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import plop_dist
from plop_dist.config.loading import parse_config
from plop_dist.config.reference import example, explained, sections
from plop_dist.errors import ConfigError, PlopError
from plop_dist.launch import doctor
from plop_dist.registry import EXPORTERS, names
from tests.cli.cases import plop_dist as command
from tests.cli.cases import write_case
from tests.models import save_tiny


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a configuration whose run is done."""
    directory = tmp_path_factory.mktemp("asked")
    config = write_case(directory, save_tiny("llama", directory / "model"))
    assert command("run", config).status == 0
    return directory


def test_the_version() -> None:
    assert command("--version").out == f"plop-dist {plop_dist.__version__}\n"


@pytest.mark.slow
def test_a_key_is_explained() -> None:
    assert command("config", "data.num_samples").out.splitlines() == [
        "data.num_samples",
        "  is       Calibration samples (rows).",
        "  section  data: Which rows are read; the samples are the first num_samples in file order or a seeded "
        "shuffle.",
        "  takes    integer ≥ 1",
        "  default  200",
        "  example  plop-dist check config.yaml data.num_samples=64",
    ]
    both = command("config", "max_length").out
    assert "data.max_length" in both
    assert "train.max_length" in both
    assert all(f"  {key.name}" in command("config").out for section in sections() for key in section.keys)
    with pytest.raises(ConfigError, match=r"KEY is 'num_sample', .*Did you mean 'data\.num_samples'\?"):
        explained("num_sample")


def test_the_example_of_every_key_is_accepted() -> None:
    refused = []
    for section in sections():
        for key in section.keys:
            tree: dict[str, Any] = {"model": {"name_or_path": "m"}, "data": {"path": "d"}}
            value = yaml.safe_load(example(key).replace("{question}", "question"))
            node = tree
            for name in key.name.split(".")[:-1]:
                node = node.setdefault(name, {})
            node[key.field] = value
            try:
                parse_config(tree)
            except PlopError as error:  # a size that this layout does not have, an option without its policy
                refused.append((key.name, str(error)))
    assert [name for name, text in refused if f"{name}: expected" in text or "unknown" in text] == []


def told(*words: object) -> tuple[int, dict[str, Any]]:
    outcome = command(*words)
    return outcome.status, json.loads(outcome.out)


def test_check_as_json(done: Path) -> None:
    status, tree = told("check", done / "config.yaml", "--json")
    assert (status, tree["schema"], tree["ok"], tree["problems"]) == (0, "plop-dist/check/1", True, [])
    assert tree["would_run"].keys() == {"score", "place", "export"}
    assert tree["next"] == f"plop-dist run {done / 'config.yaml'}"
    assert any("all of them are scored" in text for text in tree["warnings"])
    status, tree = told("check", done / "config.yaml", "placement.k=99", "--json")
    assert (status, tree["ok"], tree["next"]) == (2, False, None)
    assert "placement.k is 99" in tree["problems"][0]
    status, tree = told("check", done / "nowhere.yaml", "--json")
    assert (status, tree["schema"], tree["ok"], tree["exit_status"]) == (2, "plop-dist/error/1", False, 2)


def test_place_export_and_diff_as_json(done: Path) -> None:
    run_dir = done / "run"
    status, tree = told("place", run_dir, "k=2", "--json")
    assert (status, tree["schema"], len(tree["module_types"])) == (0, "plop-dist/place/1", 2)
    assert {"warnings", "notes", "next", "num_trainable_parameters", "rank", "types"} <= tree.keys()
    status, tree = told("export", run_dir, "--to", "peft", "--json")
    assert (status, tree["schema"], tree["target"]) == (0, "plop-dist/export/1", "peft")
    (file,) = tree["files"]
    assert Path(file).is_file()
    status, tree = told("diff", run_dir, file, "--json")
    assert (status, tree["schema"], tree["is_same"], tree["next"]) == (0, "plop-dist/diff/1", True, None)


@pytest.mark.parametrize("words", [("--to",), ("--to", "--json")])
def test_export_without_a_target_lists_what_each_can_express(done: Path, words: tuple[str, ...]) -> None:
    run_dir = done / "run"
    before = sorted((run_dir / "exports").rglob("*"))
    outcome = command("export", run_dir, *words)
    assert outcome.status == 0
    assert all(name in outcome.out for name in names(EXPORTERS))
    assert sorted((run_dir / "exports").rglob("*")) == before
    if "--json" in words:
        tree = json.loads(outcome.out)
        assert {entry["verdict"] for entry in tree["targets"]} <= {"exact", "with --widen", "refused"}
    else:
        assert "this one  exactly" in outcome.out


@pytest.mark.slow
def test_a_probe_that_hangs_or_fails_is_a_finding() -> None:
    begun = time.monotonic()
    hung = doctor.probe("gloo", "import time; time.sleep(60)", limit_s=1)
    assert (hung.status, hung.text) == ("failed", "no answer within 1 s")
    assert time.monotonic() - begun < 20
    failed = doctor.probe("Ray", "import sys; print('why'); sys.exit(3)", limit_s=20)
    assert failed.status == "failed"
    assert failed.text.startswith("why (")


RECORDING = """\
plop-dist              ok      0.1.0, Python V
machine                ok      SYSTEM
torch                  ok      V
transformers           ok      V
numpy                  ok      V
pydantic               ok      V
safetensors            ok      V
"""


@pytest.mark.slow
def test_the_doctor_s_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_show")
    outcome = command("doctor")
    assert outcome.status == 0, outcome.out
    text = re.sub(r"(?<=Python )[\d.]+|(?<=ok      )\d[\d.]*[\w+.]*$", "V", outcome.out, flags=re.MULTILINE)
    text = re.sub(r"(?m)^(machine +ok +).*", r"\1SYSTEM", text)
    assert text.startswith(RECORDING)
    for what in ("backend transformers", "backend megatron", "devices", "interfaces", "gloo", "Ray"):
        assert re.search(rf"^{what} +(ok|absent) ", text, re.MULTILINE), text
    assert re.search(r"^gloo +ok +two ranks summed a tensor \([\d.]+ s\)$", text, re.MULTILINE)
    assert re.search(r"^variables +ok .*HF_TOKEN.* set", text, re.MULTILINE)
    assert "do_not_show" not in text
