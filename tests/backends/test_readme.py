"""The page on backends says what the records say, and its backend is one: added from outside, by an entry point."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import plop_dist
from plop_dist.registry import BACKENDS, load, names
from plop_dist.values.scores import Scores
from tests.models import save_tiny

PAGE = Path(plop_dist.__file__).parent / "backends" / "README.md"


def layouts() -> str:
    """Return the page's table of layouts, from the records of this package."""
    rows = ["| backend | layouts | limits |", "| --- | --- | --- |"]
    for name in BACKENDS.own:
        record = load(BACKENDS, name)
        cells = (f"`{name}`: {record.summary}", "<br>".join(record.layouts), "<br>".join(record.limits))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def test_the_table_of_layouts_is_the_records() -> None:
    found = re.search(r"<!-- from the records -->\n\n(.*?)\n\n", PAGE.read_text(), re.DOTALL)
    assert found is not None
    assert found[1] == layouts(), f"put this there:\n{layouts()}"


def test_every_record_says_what_it_is() -> None:
    for name in BACKENDS.own:
        record = load(BACKENDS, name)
        assert record.name == name
        assert all((record.summary, record.layouts, record.limits, record.hosts))
        for line in (record.summary, *record.layouts, *record.limits):
            assert "\n" not in line
            assert not line.endswith(".")


def blocks() -> dict[str, str]:
    """Return the files that the page shows, by name."""
    return dict(re.findall(r"^`([\w./-]+)`:\n\n```\w+\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Install the page's package as pip would, below a directory that is put on the path."""
    site = tmp_path / "site"
    for name, text in blocks().items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (site / "strips_plop" / "__init__.py").touch()
    metadata = site / "strips_plop-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: strips-plop\nVersion: 1.0\n")
    groups = re.findall(r'^\[project\.entry-points\."([\w.]+)"\]\n(.+)$', blocks()["pyproject.toml"], re.MULTILINE)
    entries = [f"[{group}]\n{entry.replace(chr(34), '')}\n" for group, entry in groups]
    (metadata / "entry_points.txt").write_text("\n".join(entries))
    return site


JOB = """
import json, sys
import torch
import plop_dist
from plop_dist.cli import app
from strips_plop.model import Engine
from plop_dist.backends.hf.load import load_model
from plop_dist.config.loading import load_config

path, commands = sys.argv[1], json.loads(sys.argv[2])
for command in commands:
    app(command, standalone_mode=False)
engine = Engine(load_model(load_config(path).model))
scores = plop_dist.score(engine, [{"input_ids": torch.arange(1, 9)[None]}], num_directions=4)
print(json.dumps({"backend": scores.parallel["backend"], "modules": len(scores.modules)}))
"""


@pytest.mark.slow
def test_a_backend_from_another_package_is_checked_scored_listed_and_recognised(
    installed: Path, tmp_path: Path
) -> None:
    model = save_tiny("llama", tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {n} {n * n}"}) + "\n" for n in range(5)))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"run_dir: {tmp_path / 'run'}\nmodel: {{name_or_path: {model}, dtype: float32}}\n"
        f"data: {{path: {tmp_path / 'rows.jsonl'}, text_field: text}}\n"
    )
    own = "parallel.backend=strips"
    alone = ["score", str(config), f"run_dir={tmp_path / 'alone'}"]
    commands = [["check", str(config), own], ["score", str(config), own], alone, ["backends"]]
    done = subprocess.run(
        [sys.executable, "-c", JOB, str(config), json.dumps(commands)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(PAGE.parents[2])])},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Ranks: 1 · strips, one process" in done.stdout
    assert "a framework of our own: whole models in its engines" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == {"backend": "strips", "modules": 14}
    scores = Scores.from_file(tmp_path / "run" / "scores.json")
    assert scores.parallel["backend"] == "strips"
    assert scores.modules == Scores.from_file(tmp_path / "alone" / "scores.json").modules

    refused = subprocess.run(
        [sys.executable, "-m", "plop_dist.cli", "check", str(config), own, "parallel.tp=2"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(PAGE.parents[2])])},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "parallel.backend 'strips' has no tensor parallelism; use parallel.backend=transformers" in refused.stderr


def test_this_package_does_not_know_it() -> None:
    assert "strips" not in names(BACKENDS)
