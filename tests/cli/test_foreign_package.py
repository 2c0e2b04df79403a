"""One package of somebody else's adds a policy, a target and a backend: every command lists, checks and uses them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plop_dist import cli
from tests.cli.cases import Outcome, write_case
from tests.models import save_tiny

CHECKOUT = Path(cli.__file__).parents[2]

PACKAGE = '''
"""What somebody else adds."""

from plop_dist.backends.hf.record import Transformers
from plop_dist.choose.policies.lowest_highest import choose_first
from plop_dist.choose.policy import Policy
from plop_dist.errors import LayoutError
from plop_dist.values.placement import Export


class Single(Policy):
    name = "single"
    summary = "the lowest one alone"

    def rule(self, candidates, config):
        return lambda values_bU: choose_first(values_bU, 1)

    def sentence(self, config):
        return "the lowest one"


class Slate:
    name = "slate"
    summary = "slate's list of paths"
    engines = ("slate",)
    keys = ("slate.paths",)
    matching = "whole paths"
    limits = ("more than two modules (--widen: all of them)",)
    flags_in = "shell"

    def export(self, placement, *, engine=None, widen=False):
        paths = "\\n".join(placement.modules) + "\\n"
        return Export(target=self.name, files={"slate.txt": paths}, flags=("--slate",), notes=(), widened=())


class Mirror(Transformers):
    name = "mirror"
    summary = "transformers by another name"

    def check_model(self, hf_config, config):
        if config.parallel.dp > 2:
            raise LayoutError(f"mirror: parallel.dp is {config.parallel.dp}, expected 2 at most.")


def short(completions, **columns):
    return [0.0 for _ in completions]


SINGLE, SLATE, MIRROR = Single(), Slate(), Mirror()
'''
ENTRY_POINTS = """
[plop_dist.policies]
single = other_labs:SINGLE
[plop_dist.exporters]
slate = other_labs:SLATE
[plop_dist.backends]
mirror = other_labs:MIRROR
[plop_dist.rewards]
short = other_labs:short
"""

DRIVER = """
import dataclasses, json, sys
from tests.cli.cases import plop_dist
print(json.dumps([dataclasses.asdict(plop_dist(*command)) for command in json.loads(sys.argv[1])]))
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The folder of a package that is installed: its module, and what says so."""
    site = tmp_path / "site"
    metadata = site / "other_labs-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "other_labs.py").write_text(PACKAGE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-labs\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    return site


def outcomes(site: Path, *commands: list[str], **variables: str) -> list[Outcome]:
    """Return what these commands do one after the other, where the package is installed."""
    path = os.pathsep.join([str(CHECKOUT), str(site)])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(commands)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": path, **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [Outcome(**fields) for fields in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.slow
def test_every_command_knows_them(site: Path, tmp_path: Path) -> None:
    config = str(write_case(
        tmp_path, save_tiny("llama", tmp_path / "model"), parallel={"backend": "mirror"},
        placement={"policy": "single"}, export={"targets": ["slate"]}, train={"rewards": ["short"]},
    ))  # fmt: skip
    run_dir = str(tmp_path / "run")
    found = outcomes(
        site,
        ["check", config],
        ["check", config, "parallel.dp=3"],
        ["score", config],
        ["place", run_dir, "--explain"],
        ["export", run_dir, "--to", "slate"],
        ["run", config],
        ["targets", run_dir, "--to", "slate"],
        ["targets"],
        ["backends"],
        ["schema"],
    )
    checked, refused, scored, placed, exported, ran, fitting, targets, backends, schema = found
    for outcome in (checked, scored, placed, exported, ran, fitting, targets, backends, schema):
        assert outcome.status == 0, outcome.err
    assert (refused.status, "mirror: parallel.dp is 3, expected 2 at most." in refused.err) == (2, True)
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["parallel"]["backend"] == "mirror"
    placement = json.loads((tmp_path / "run" / "placement.json").read_text())
    assert len(placement["module_types"]) == 1
    assert "Why · the lowest one" in placed.out
    assert (tmp_path / "run" / "exports" / "slate" / "slate.txt").read_text().split() == placement["modules"]
    assert "--slate" in exported.out
    assert "this one  exactly" in fitting.out
    assert "slate's list of paths" in targets.out
    assert "transformers by another name" in backends.out
    sections = json.loads(schema.out)["$defs"]
    assert "mirror" in sections["ParallelConfig"]["properties"]["backend"]["enum"]
    assert "single" in sections["PlacementConfig"]["properties"]["policy"]["enum"]
    assert "slate" in sections["ExportConfig"]["properties"]["targets"]["items"]["enum"]


def test_shells_complete_them(site: Path) -> None:
    words = ["plop-dist", "export", "runs/x", "--to", "sl"]
    found = outcomes(site, [], _PLOP_DIST_COMPLETE="complete_bash", COMP_WORDS="\n".join(words), COMP_CWORD="4")
    assert found[0].out.split() == ["slate"]
