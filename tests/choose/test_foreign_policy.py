"""The page on adding a policy is true: its package, installed beside ours, is used by everything that places."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import plop_dist
from tests.choose.cases import make_scores

PAGE = Path(plop_dist.__file__).parent / "choose" / "README.md"


def blocks(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(found) == 1, f"the page has {len(found)} blocks of {language}"
    return found[0]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's package, as pip leaves it behind: the module, and what says that it is installed."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "nfn_share.py").write_text(blocks("python"))
    project = tomllib.loads(blocks("toml"))["project"]
    info = folder / f"nfn_share-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    (group, names), *_ = project["entry-points"].items()
    (info / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{key} = {at}\n" for key, at in names.items()))
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    make_scores().to_file(tmp_path / "scores.json")
    return tmp_path


def run(package: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(PAGE.parents[2]), *([str(package)] if package is not None else [])]
    return subprocess.run(
        [sys.executable, "-m", "plop_dist.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


@pytest.mark.slow
def test_the_page_runs(package: Path, run_dir: Path) -> None:
    command = re.search(r"^    plop-dist (place .*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert command is not None
    _, _, *options = command[1].split()
    done = run(package, "place", str(run_dir), *options)
    assert done.returncode == 0, done.stderr
    placement = json.loads((run_dir / "placement.json").read_text())
    assert placement["module_types"] == ["o_proj", "v_proj"]  # 30% of seven types
    assert placement["policy"]["options"] == {"share": 0.3}
    assert "Why · the lowest 30% of the types" in done.stdout
    assert "policy lowest_share takes it" in done.stdout
    assert "policy lowest_share leaves it" in done.stdout
    assert re.search(r"^lowest_k +o_proj v_proj ", done.stdout, flags=re.MULTILINE), "an alternative of ours"
    assert re.search(r"Choice by share .*\nshare +adds type .*\n +0\.25 .*\n +0\.5 ", done.stdout)
    assert "P(final choice)" in done.stdout
    done = run(package, "report", str(run_dir))
    assert done.returncode == 0, done.stderr
    assert "the lowest 30% of the types" in (run_dir / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["placement.options.share=2"], ["placement.options.share is 2, expected a number above 0"]),
        (["placement.options.shares=0.3"], ["'shares' is no option of policy 'lowest_share'", "Did you mean 'share'?"]),
        (["placement.policy=lowest_shares"], ["unknown policy 'lowest_shares'", "Did you mean 'lowest_share'?"]),
        (
            ["placement.policy=lowest_k", "placement.options.share=0.3"],
            ["'share' is no option of policy 'lowest_k'", "It takes none: set placement.options={}."],
        ),
    ],
)
def test_its_mistakes_are_named(package: Path, run_dir: Path, options: list[str], parts: list[str]) -> None:
    done = run(package, "place", str(run_dir), "placement.policy=lowest_share", *options)
    assert done.returncode == 2
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["plop-dist place", "error"]
    for part in parts:
        assert part in done.stderr


@pytest.mark.slow
def test_without_the_package_its_placement_is_still_read_and_the_policy_named(package: Path, run_dir: Path) -> None:
    done = run(package, "place", str(run_dir), "placement.policy=lowest_share")
    assert done.returncode == 0, done.stderr
    done = run(None, "export", str(run_dir), "--to", "trl")
    assert done.returncode == 0, done.stderr
    done = run(None, "report", str(run_dir))
    assert done.returncode == 2
    assert "unknown policy 'lowest_share'" in done.stderr


def test_an_entry_point_that_is_a_class_is_named(package: Path, run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "site"
    other.mkdir()
    (other / "nfn_share.py").write_text((package / "nfn_share.py").read_text())
    info = other / "wrong-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wrong\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[plop_dist.policies]\nwrong = nfn_share:LowestShare\n")
    done = run(other, "place", str(run_dir), "placement.policy=wrong")
    assert done.returncode == 2
    assert "expected an instance of a subclass of plop_dist.choose.policy.Policy" in done.stderr
