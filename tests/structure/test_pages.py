"""Pages lead where they say: links, anchors and paths exist, tables are the schema's, the API reference is whole."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import types
from functools import cache
from pathlib import Path

import pytest

from tests.structure.test_imports import ROOT, levels

CHECKOUT = ROOT.parent
FOLDERS = ("plop_dist", "configs", "launchers", "docker", "tests")
PAGES = [*sorted(CHECKOUT.glob("*.md")), *(page for room in FOLDERS for page in (CHECKOUT / room).rglob("*.md"))]
ROOMS = ("plop_dist", "plop_dist/choose", "plop_dist/exporters", "plop_dist/backends", "plop_dist/measure",
         "plop_dist/training", "configs", "launchers", "launchers/examples", "docker", "tests")  # fmt: skip


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Return the links of a page that lead to no file or no heading; those to the web are not followed."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@cache
def file_names() -> frozenset[str]:
    """Return the names of all files: a page may name one without its folder."""
    return frozenset(path.name for folder in FOLDERS for path in (CHECKOUT / folder).rglob("*"))


def lost_paths(page: Path) -> list[str]:
    """Return the files and folders that a page names in backticks and that are not there."""
    lost = []
    for name in re.findall(r"`([\w.-]+(?:/[\w.-]+)*/?)`", prose(page)):
        if not re.search(r"/$|\.(py|yaml|sh|md|toml|txt|html\.j2)$", name) or name.startswith(MADE):
            continue
        known = any((root / name).exists() for root in (page.parent, CHECKOUT, ROOT))
        if not known and not ("/" not in name and name in file_names()):
            lost.append(name)
    return lost


# What runs and users write, and packages of other people in examples.
MADE = (
    "config.yaml", "quickstart.yaml", "a.yaml", "runs/", "train/adapter/", "adapter/", "megatron_adapter/",
    "checkpoints/step-", "checkpoints/checkpoint-", "depends_on.txt", "held_out_before.txt", "skyrl/",
    "verl/", "nemo-rl/", "launch.sh", "tensorboard/", "wandb/", "strips_plop/", "nfn_share.py", "quilt_plop.py",
    "tests/parsers/TARGET", "RUN_DIR/log.txt",
)  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(CHECKOUT).as_posix())
def test_links_and_paths_of_a_page_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []
    assert lost_paths(page) == []


def test_a_broken_page_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(
        "# A: b\n[x](nowhere.md) [y](#a-b) [z](#c) `plop_dist/nowhere.py` `plop_dist/ranks.py`\n```\n[q](q)\n```\n"
    )
    assert broken_links(page) == ["nowhere.md", "#c"]
    assert lost_paths(page) == ["plop_dist/nowhere.py"]


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_that_people_enter_has_a_page_which_can_be_found_from_the_first(room: str) -> None:
    page = (CHECKOUT / room / "README.md").resolve()
    assert page.is_file()
    linked, todo = set(), [CHECKOUT / "README.md"]
    while todo:
        current = todo.pop()
        for target in re.findall(r"\]\(([^)#\s]+\.md)", prose(current)):
            found = (current.parent / target).resolve()
            if found.is_file() and found not in linked:
                linked.add(found)
                todo.append(found)
    assert page in linked


def test_the_picture_of_the_floors_is_the_linter_s() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    picture = text.split("## Folders and floors")[1].split("```")[1].strip("\n").splitlines()
    drawn = {
        room.strip(): depth
        for depth, line in enumerate(picture)
        for room in re.split(r"\s{2,}", line.strip())[0].split("|")
    }
    assert drawn == levels()


def test_the_tables_of_keys_are_the_schema_s() -> None:
    from plop_dist.config.reference import markdown

    text = (CHECKOUT / "configs" / "README.md").read_text(encoding="utf-8")
    assert text.split("`make reference` renews them.\n\n")[1] == markdown() + "\n", "run make reference"


def docs_script() -> types.ModuleType:
    """Return .ci/docs.py as a module."""
    spec = importlib.util.spec_from_file_location("docs", CHECKOUT / ".ci" / "docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_api_reference_is_built_without_a_warning_or_a_broken_link(tmp_path: Path) -> None:
    command = [sys.executable, str(CHECKOUT / ".ci" / "docs.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    first = (tmp_path / "plop_dist.html").read_text(encoding="utf-8")
    public = [first.index(f'<section id="{name}">') for name in ("score", "place", "Scores", "Placement")]
    assert public == sorted(public)
    for room in levels():
        assert (tmp_path / "plop_dist" / f"{room}.html").is_file()
    assert "PydanticUndefined" not in first


def test_a_broken_link_in_the_api_reference_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<p id="here"><a href="b.html#x"></a><a href="#here"></a><a href="c.html"></a>')
    (tmp_path / "b.html").write_text('<a href="a.html#there"></a><a href=""></a><a href="https://example.org/z"></a>')
    assert docs_script().faults(tmp_path) == [
        "a.html: b.html#x has no such anchor",
        "a.html: c.html does not exist",
        "b.html: a.html#there has no such anchor",
        "b.html: a link to nothing",
    ]


def test_docstrings_lose_nothing_where_they_become_html() -> None:
    """`<name>` outside backticks would be a tag."""
    lost = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = re.sub(r"`[^`]*`|^\s*>>>.*$", "", ast.get_docstring(node) or "", flags=re.MULTILINE)
                lost += [f"{path.relative_to(ROOT)}: {tag}" for tag in re.findall(r"<\w[^>\s]*>", text)]
    assert lost == []
