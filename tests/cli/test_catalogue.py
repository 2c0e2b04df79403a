"""`targets` and `backends` say what there is, read off the objects, and what each can express of a placement."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from plop_dist.errors import ConfigError
from plop_dist.exporters.exporter import find_exporter
from plop_dist.registry import BACKENDS, EXPORTERS, load, names
from tests.cli.cases import assert_one_message, plop_dist, write_case
from tests.models import save_tiny


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory whose placement is v, up and down: a part of what some targets take only together."""
    directory = tmp_path_factory.mktemp("catalogue")
    config = write_case(directory, save_tiny("llama", directory / "model"))
    assert plop_dist("score", config).status == 0
    placed = plop_dist("place", directory / "run", "include=[v_proj,up_proj,down_proj]")
    assert placed.status == 0, placed.err
    return directory / "run"


def entries(printed: str) -> dict[str, str]:
    """Return what is printed below each name."""
    found = re.findall(r"^(\S+)\n((?:  .*\n)+)", printed, re.MULTILINE)
    return dict(found)


def test_every_target_is_listed_with_what_it_says_of_itself() -> None:
    listed = entries(plop_dist("targets").out)
    assert tuple(listed) == names(EXPORTERS)
    for name, text in listed.items():
        target = load(EXPORTERS, name)
        for line in (target.summary, ", ".join(target.keys), target.matching, *target.limits):
            assert line in text


def test_every_backend_is_listed_with_what_it_says_of_itself() -> None:
    listed = entries(plop_dist("backends").out)
    assert tuple(listed) == names(BACKENDS)
    for name, text in listed.items():
        backend = load(BACKENDS, name)
        for line in (backend.summary, *backend.keys, *backend.layouts, *backend.limits, backend.hosts):
            assert line in text
    assert tuple(entries(plop_dist("backends", "megatron").out)) == ("megatron",)


@pytest.mark.parametrize("name", names(EXPORTERS))
def test_what_a_target_is_said_to_express_is_what_export_does(run_dir: Path, name: str) -> None:
    printed = plop_dist("targets", run_dir, "--to", name)
    assert printed.status == 0, printed.err
    text = entries(printed.out)[name].split("  this one  ")[1].split("\n  writes ")[0]
    engines = load(EXPORTERS, name).engines
    verdicts: dict[str, Any] = dict.fromkeys(engines, text)
    if len(engines) > 1:
        lines = [line.strip().split(": ", 1) for line in text.splitlines()]
        verdicts = {engine: verdict for several, verdict in lines for engine in several.split(", ")}
    assert tuple(sorted(verdicts)) == tuple(sorted(engines))
    for engine, verdict in verdicts.items():
        plain = plop_dist("export", run_dir, "--to", name, "--engine", engine)
        assert (plain.status == 0) == verdict.strip().startswith("exactly"), (engine, verdict)
        widened = plop_dist("export", run_dir, "--to", name, "--engine", engine, "--widen")
        assert (widened.status == 0) == (not verdict.strip().startswith("no: ")), (engine, verdict)


def test_the_three_verdicts_occur(run_dir: Path) -> None:
    assert plop_dist("place", run_dir, "include=[v_proj,up_proj,down_proj]").status == 0
    listed = entries(plop_dist("targets", run_dir).out)
    assert "this one  exactly" in listed["peft"]
    assert "this one  with --widen: " in listed["torchtune"]
    assert plop_dist("place", run_dir, "include=[v_proj]", "k=1", "alpha=2.5").status == 0
    assert "this one  no: trl" in entries(plop_dist("targets", run_dir).out)["trl"]


def test_a_package_that_is_broken_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        if name == "trl":
            raise ConfigError("export target 'trl' of the package 'x' cannot be imported; mend or uninstall it.")
        return find_exporter(name)

    monkeypatch.setattr("plop_dist.report.catalogue.find_exporter", broken)
    listed = entries(plop_dist("targets").out)
    assert tuple(listed) == names(EXPORTERS)
    assert "not to be used: export target 'trl' of the package 'x'" in listed["trl"]
    assert_one_message(plop_dist("targets", "--to", "trl"), "of the package 'x'")


def test_unknown_names_and_places_are_one_message(tmp_path: Path) -> None:
    assert_one_message(plop_dist("targets", "--to", "pefft"), "'pefft'", "Did you mean 'peft'?")
    assert_one_message(plop_dist("backends", "megatorn"), "'megatorn'", "Did you mean 'megatron'?")
    assert_one_message(plop_dist("targets", tmp_path), str(tmp_path), "run plop-dist place first")
