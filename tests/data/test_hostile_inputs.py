"""Models, templates and data of somebody else are read as data: none of their code runs, nothing leads out of a folder.

What comes with a model as Python files is tested in tests/backends/hf/test_foreign_code.py.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import jinja2
import pytest
import torch
import yaml

from plop_dist.registry import EXPORTERS, names
from tests import payloads
from tests.fuzz.commands import Outcome, digests, run_here
from tests.fuzz.hostile import CATASTROPHIC
from tests.models import save_tiny

ROW = {"text": "one and two", "question": "one", "messages": [{"role": "user", "content": "one"}]}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "model")


def score(folder: Path, model: Path, **data: object) -> Outcome:
    tree = {
        "run_dir": str(folder / "run"),
        "model": {"name_or_path": str(model)},
        "data": {"path": str(folder / "rows.jsonl"), "num_samples": 1, "max_length": 16, **data},
        "estimator": {"num_directions": 2},
    }
    (folder / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return run_here(("score", str(folder / "config.yaml")))


def refused(outcome: Outcome) -> None:
    assert outcome.status == 2, outcome
    assert "weights_only" not in outcome.err


def test_weights_in_a_pickle_run_nothing(tmp_path: Path, model: Path) -> None:
    theirs = tmp_path / "model"
    theirs.mkdir()
    for path in model.iterdir():
        if path.suffix == ".json":
            (theirs / path.name).write_bytes(path.read_bytes())
    marker = tmp_path / "marker"
    for is_zip in (True, False):
        file = payloads.torch_file(theirs / "pytorch_model.bin", marker, {"x": torch.zeros(1)}, is_zip=is_zip)
        assert payloads.fires(marker, lambda file=file: torch.load(file, weights_only=False))
        refused(score(tmp_path, theirs, text_field="text"))
        assert not marker.exists()


def test_a_pattern_of_a_quantised_checkpoint_has_a_time_limit(tmp_path: Path, model: Path) -> None:
    theirs = tmp_path / "model"
    theirs.mkdir()
    for path in model.iterdir():
        (theirs / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head", CATASTROPHIC[0]]}
    (theirs / "config.json").write_text(json.dumps(config))
    outcome = score(tmp_path, theirs, text_field="text")
    refused(outcome)
    assert f"quantization_config.modules_to_not_convert {CATASTROPHIC[0]!r} takes more than 4 s" in outcome.err


def test_a_pattern_of_a_tokenizer_without_end_is_one_message(tmp_path: Path, model: Path) -> None:
    theirs = tmp_path / "model"
    theirs.mkdir()
    for path in model.iterdir():
        (theirs / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    pattern = {"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = pattern
    (theirs / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "a" * 60 + "?"}))
    outcome = score(tmp_path, theirs, path=str(tmp_path / "long.jsonl"), text_field="text")
    refused(outcome)
    assert "the tokenizer fails on these texts (Onig: Regex search error: retry-limit-in-match over)" in outcome.err


TEMPLATES = (
    "{{ cycler.__init__.__globals__.os.mkdir('MARKER') }}",
    "{{ lipsum.__globals__['os'].mkdir('MARKER') }}",
    "{% for c in ().__class__.__base__.__subclasses__() %}{% if c.__name__ == 'catch_warnings' %}"
    "{{ c()._module.__builtins__['__import__']('os').mkdir('MARKER') }}{% endif %}{% endfor %}",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}{{ joiner.__init__.__globals__.os.mkdir('MARKER') }}",
    "{{ raise_exception.__globals__['os'].mkdir('MARKER') }}",
    "{{ ''.format.__self__.__class__ }}{{ '{0.__class__.__init__.__globals__[os]}'.format(cycler).mkdir('MARKER') }}",
    "{% include '/etc/passwd' %}",
)  # fmt: skip


def test_a_chat_template_runs_nothing(tmp_path: Path, model: Path) -> None:
    theirs, marker = tmp_path / "model", tmp_path / "marker"
    theirs.symlink_to(model)
    assert payloads.fires(marker, jinja2.Template(TEMPLATES[0].replace("MARKER", str(marker))).render)
    theirs.unlink()
    theirs.mkdir()
    for path in model.iterdir():
        (theirs / path.name).write_bytes(path.read_bytes())
    for template in TEMPLATES:
        (theirs / "chat_template.jinja").write_text(template.replace("MARKER", str(marker)))
        refused(score(tmp_path, theirs, messages_field="messages"))
        assert not marker.exists(), template
    (theirs / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert score(tmp_path, theirs, messages_field="messages").status == 0


def _script(folder: Path, marker: Path) -> Path:
    payloads.module(folder / "theirs" / "theirs.py", marker, "import datasets\n")
    return folder / "theirs"


def _script_of_a_file(folder: Path, marker: Path) -> Path:
    return payloads.module(folder / "theirs.py", marker)


def _pickled(ending: str) -> Callable[[Path, Path], Path]:
    def write(folder: Path, marker: Path) -> Path:
        (folder / "theirs").mkdir()
        (folder / "theirs" / f"train.{ending}").write_bytes(pickle.dumps(payloads.Trap(marker)))
        return folder / "theirs"

    return write


def _archive(folder: Path, marker: Path) -> Path:
    (folder / "theirs").mkdir()
    payloads.webdataset(folder / "theirs" / "train-000.tar", marker)
    return folder / "theirs"


@pytest.mark.parametrize(
    "write", [_script, _script_of_a_file, _pickled("pkl"), _pickled("pickle"), _pickled("pt"), _archive]
)
def test_data_runs_nothing(write: Callable[[Path, Path], Path], tmp_path: Path, model: Path) -> None:
    marker = tmp_path / "marker"
    path = write(tmp_path, marker)
    outcome = score(tmp_path, model, path=str(path), text_field="txt")
    assert not marker.exists()
    assert outcome.status in (0, 2), outcome  # an archive's texts may be read
    assert "weights_only" not in outcome.err


@pytest.mark.parametrize("template", ["{question.__class__}", "{question!r}", "{question[0]}", "{0.__globals__}"])
def test_a_template_of_rows_reaches_no_attribute(template: str, tmp_path: Path, model: Path) -> None:
    outcome = score(tmp_path, model, template=template)
    refused(outcome)
    assert re.search("template|has no column", outcome.err)


@pytest.mark.parametrize("name", ["../outside", "peft/../../outside", "plop_dist.cli"])
def test_no_name_of_a_target_or_engine_leads_out(name: str, tmp_path: Path, model: Path) -> None:
    assert score(tmp_path, model, text_field="text").status == 0
    run = str(tmp_path / "run")
    assert run_here(("place", run)).status == 0
    before = digests(tmp_path)
    refused(run_here(("export", run, "--to", name)))
    for target in names(EXPORTERS):
        outcome = run_here(("export", run, "--to", target, "--engine", name, "--widen"))
        refused(outcome)
    for key in (
        "export.targets=[X]",
        "parallel.backend=X",
        "train.engine=X",
        "placement.policy=X",
        "train.rewards=[X]",
    ):
        override = key.replace("X", json.dumps(name))
        refused(run_here(("run", str(tmp_path / "config.yaml"), override, "train.method=grpo")))
    logs = ("run/events.jsonl", "run/command.txt", "run/config.yaml")
    assert {path: text for path, text in digests(tmp_path).items() if not path.startswith(logs)} == {
        path: text for path, text in before.items() if not path.startswith(logs)
    }
