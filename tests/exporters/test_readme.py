"""The page on exporters says what the objects say, and its targets are two: added from outside, by entry points."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

import plop_dist
from plop_dist.exporters.exporter import find_exporter
from plop_dist.registry import EXPORTERS, names
from tests.exporters.cases import llama_projections, place, scores_of
from tests.models import save_tiny

PAGE = Path(plop_dist.__file__).parent / "exporters" / "README.md"


def targets() -> str:
    """Return the page's table of targets, from the exporters of this package."""
    rows = ["| target | engines | keys | a name matches | cannot express |", "| --- | --- | --- | --- | --- |"]
    for name in EXPORTERS.own:
        exporter = find_exporter(name)
        cells = (
            f"`{name}`: {exporter.summary}",
            ", ".join(exporter.engines),
            keys(exporter.keys),
            exporter.matching,
            "<br>".join(exporter.limits),
        )
        rows.append(f"| {' | '.join(cell.replace('*', chr(92) + '*') for cell in cells)} |")
    return "\n".join(rows)


def keys(dotted: Iterable[str]) -> str:
    """Return keys for reading, those of one section together."""
    found: dict[str, list[str]] = {}
    for key in dotted:
        section, _, last = key.rpartition(".")
        found.setdefault(section, []).append(last)
    return "; ".join(f"`{section}.`: {names}" if section else names for section, names in (
        (section, ", ".join(f"`{name}`" for name in names)) for section, names in found.items()
    ))  # fmt: skip


def test_the_table_of_targets_is_the_objects() -> None:
    found = re.search(r"<!-- from the objects -->\n\n(.*?)\n\n", PAGE.read_text(), re.DOTALL)
    assert found is not None
    assert found[1] == targets(), f"put this there:\n{targets()}"


def test_every_file_of_the_room_is_named() -> None:
    table = PAGE.read_text().partition("## Targets")[0]
    for path in PAGE.parent.glob("*.py"):
        assert path.name == "__init__.py" or f"`{path.name}`" in table, f"the page does not say what {path.name} is"


def blocks() -> dict[str, str]:
    """Return the files that the page shows, by name."""
    return dict(re.findall(r"^`([\w./-]+)`:\n\n```\w+\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Install the page's package as pip would, below a directory that is put on the path."""
    site = tmp_path / "site"
    metadata = site / "quilt_plop-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "quilt_plop.py").write_text(blocks()["quilt_plop.py"])
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: quilt-plop\nVersion: 1.0\n")
    ((group, entries),) = re.findall(
        r'^\[project\.entry-points\."([\w.]+)"\]\n(.+)\Z', blocks()["pyproject.toml"], re.MULTILINE | re.DOTALL
    )
    (metadata / "entry_points.txt").write_text(f"[{group}]\n" + entries.replace('"', ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(PAGE.parents[2])])}


def command(environment: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "plop_dist.cli", *map(str, words)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_targets_of_another_package_are_exported_to_listed_and_held_to_the_contract(environment, tmp_path) -> None:
    placement = place(scores_of(llama_projections()), ["v_proj", "o_proj"])
    placement.source.to_file(tmp_path / "run" / "scores.json")
    placement.to_file(tmp_path / "run" / "placement.json")
    done = command(environment, "export", tmp_path / "run", "--to", "quilt")
    assert done.returncode == 0, done.stderr
    paths = [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("v_proj", "o_proj")]
    assert f"--adapters.paths {' '.join(paths)}" in done.stdout
    tree = json.loads((tmp_path / "run" / "exports" / "quilt" / "adapters.json").read_text())
    assert tree == {"adapters": {"paths": paths, "rank": 4, "alpha": 8}}
    assert command(environment, "export", tmp_path / "run", "--to", "patchwork").returncode == 0
    file = tmp_path / "run" / "exports" / "patchwork" / "patchwork.yaml"
    assert yaml.safe_load(file.read_text()) == {"lora.rank": 4, "lora.alpha": 8, "lora.targets": ["o_proj", "v_proj"]}

    listed = command(environment, "targets", tmp_path / "run")
    assert listed.returncode == 0, listed.stderr
    ours = r"^quilt\n  this one +exactly\n  writes +quilt's adapters.json and flags\n"
    assert re.search(ours, listed.stdout, re.MULTILINE)
    assert re.search(r"^patchwork\n", listed.stdout, re.MULTILINE)

    contract = Path(__file__).with_name("test_contract.py")
    held = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", contract, "-k", "quilt or patchwork"],
        env=environment, cwd=PAGE.parents[2], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert re.search(r"^16 passed", held.stdout, re.MULTILINE), held.stdout


@pytest.mark.slow
def test_a_target_of_another_package_is_checked_and_written_by_a_run(environment, tmp_path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {n} {n * n}"}) + "\n" for n in range(5)))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"run_dir: {tmp_path / 'run'}\nmodel: {{name_or_path: {model}, dtype: float32}}\n"
        f"data: {{path: {tmp_path / 'rows.jsonl'}, text_field: text}}\nexport: {{targets: [quilt, peft]}}\n"
    )
    assert command(environment, "check", config).returncode == 0
    done = command(environment, "run", config)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "run" / "exports").iterdir()} == {"quilt", "peft"}
    without = {**environment, "PYTHONPATH": str(PAGE.parents[2])}
    unknown = command(without, "check", config)
    assert unknown.returncode == 2
    assert re.search(r"export\.targets: unknown export target 'quilt'", unknown.stderr, re.IGNORECASE)


def test_this_package_does_not_know_them() -> None:
    assert not {"quilt", "patchwork"} & set(names(EXPORTERS))
