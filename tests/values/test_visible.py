"""Characters that are not seen are refused in names from files, and shown as escapes in whatever is printed."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

import plop_dist
from plop_dist.config.loading import parse_config
from plop_dist.errors import ConfigError, ScoresError
from plop_dist.exporters.adapter_config import read_adapter_config
from plop_dist.rundir.events import EventHandler, EventWriter, shown
from plop_dist.rundir.layout import RunDir
from plop_dist.rundir.trained import read_trained
from plop_dist.values.console import VisibleConsole
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Scores
from plop_dist.values.visible import check_names, log_text, may_hide_something, visible
from tests.choose.cases import make_scores
from tests.cli.cases import assert_one_message
from tests.cli.cases import plop_dist as command

# OSC 52 writes the clipboard, OSC 0 the title, OSC 8 a link; C1's CSI clears; directions, zero width, separators.
HOSTILE = (
    "a\x1b]52;c;cm0gLXJmIH4=\x07", "a\x1b]0;title\x07", "a\x1b]8;;http://x\x07b", "\x1b[2J", "\x9b2J", "\x9d0;x\x9c",
    "a\rb", "a\nb", "a\tb", "a\x08\x08b", "a\x00", "a\x7f", "a\u202eb", "a\u2066b", "a\u200bb", "a\u200fb",
    "a\ufeffb", "a\u2028b", "a\u2029b", "a\x85b", "a\u00adb", "a\U000e0041b",
)  # fmt: skip
PLAIN = ("q_proj", "été", "层", "a b", "x\u00a0y", "😀", "\\x1b", "")


def is_seen(text: str, also: str = "\n") -> bool:
    """Tell, apart from the code, whether a terminal shows each character of a text and does nothing else with it."""
    return all(c in also or unicodedata.category(c) not in {"Cc", "Cf", "Zl", "Zp", "Cs"} for c in text)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_not_seen_becomes_an_escape(text: str) -> None:
    shown = visible(text, keep="")
    assert is_seen(shown, also="")
    assert shown.encode().decode("unicode_escape").encode("utf-16") == text.encode("utf-16")
    assert visible(shown) == shown
    for escaped in (json.dumps(text), json.dumps(text, ensure_ascii=False)):
        assert may_hide_something(escaped)


@pytest.mark.parametrize("text", PLAIN)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert visible(text) == text
    check_names({text: [text]}, "f", "r", ScoresError)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with scores and a placement."""
    directory = tmp_path_factory.mktemp("run")
    scores = make_scores(with_samples=False)
    scores.to_file(directory / "scores.json")
    plop_dist.place(scores).to_file(directory / "placement.json")
    (directory / "train").mkdir()
    (directory / "train" / "summary.json").write_text('{"method": "sft", "note": ""}')
    (directory / "adapter_config.json").write_text('{"target_modules": ["q_proj"]}')
    return directory


def change(*keys: Any) -> Callable[[Any, str], None]:
    def put(tree: Any, text: str) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = text

    return put


READERS: dict[str, Callable[[Path], Any]] = {
    "scores.json": lambda run: Scores.from_file(run / "scores.json"),
    "placement.json": lambda run: Placement.from_file(run / "placement.json"),
    "train/summary.json": lambda run: read_trained(RunDir(run)),
    "adapter_config.json": lambda run: read_adapter_config(run / "adapter_config.json"),
}


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize(
    ("name", "keys", "field"),
    [
        ("scores.json", ("modules", 3, "type"), "modules.3.type"),
        ("scores.json", ("model", "name_or_path"), "model.name_or_path"),
        ("scores.json", ("versions", "torch"), "versions.torch"),
        ("placement.json", ("module_types", 0), "module_types.0"),
        ("placement.json", ("policy", "exclude", 0), "policy.exclude.0"),
        ("train/summary.json", ("note",), "note"),
        ("adapter_config.json", ("target_modules", 0), "target_modules.0"),
    ],
)
def test_a_name_from_a_file_is_refused_by_its_field(
    run: Path, tmp_path: Path, name: str, keys: tuple[Any, ...], field: str, ascii_only: bool
) -> None:
    for source in run.rglob("*.json"):
        target = tmp_path / source.relative_to(run)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read_bytes())
    READERS[name](tmp_path)
    whole = json.loads((tmp_path / name).read_text())
    for text in HOSTILE:
        tree = json.loads(json.dumps(whole))
        change(*keys)(tree, text)
        (tmp_path / name).write_text(json.dumps(tree, ensure_ascii=ascii_only))
        with pytest.raises(ScoresError) as raised:
            READERS[name](tmp_path)
        message = str(raised.value)
        assert message.startswith(f"{tmp_path / name}: {field}: '")
        assert "which no name may hold; " in message
        assert is_seen(message, also="")


def test_a_key_is_a_name_too_and_a_policys_own_text_may_have_lines(run: Path) -> None:
    tree = json.loads((run / "placement.json").read_text())
    with pytest.raises(ScoresError, match=r"rank_pattern: 'v\\x1bproj' holds \\x1b \(a control character\)"):
        check_names({**tree, "rank_pattern": {"v\x1bproj": 3}}, "placement.json", "r", ScoresError)
    check_names({"policy": {"options": {"code": "a\n\tb"}}}, "placement.json", "r", ScoresError)


@pytest.mark.parametrize("names", [3, "lm_head", {"lm_head": 1}, [{"lm_head": 1}]])
def test_names_in_a_policy_are_names(run: Path, tmp_path: Path, names: object) -> None:
    """What refusals and diagnostics advise is made of them."""
    tree = json.loads((run / "placement.json").read_text())
    for key in ("exclude", "include"):
        changed = {**tree, "policy": {**tree["policy"], key: names}}
        (tmp_path / "placement.json").write_text(json.dumps(changed))
        with pytest.raises(ScoresError, match=rf"placement\.json.*{key} must be a list of names"):
            READERS["placement.json"](tmp_path)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_configuration_names_no_path_that_hides_something(text: str) -> None:
    tree = {"run_dir": "r", "model": {"name_or_path": "m"}, "data": {"path": "d"}}
    for key in ("run_dir", "model.name_or_path", "data.path", "placement.exclude"):
        section, _, name = key.rpartition(".")
        value = [text] if name == "exclude" else text
        changed = {**tree, key: value} if not section else {**tree, section: {**tree.get(section, {}), name: value}}  # type: ignore[dict-item]
        with pytest.raises(ConfigError) as raised:
            parse_config(changed)
        assert is_seen(str(raised.value))
        assert key in str(raised.value)


def test_a_template_may_have_lines_and_nothing_else() -> None:
    tree = {"run_dir": "r", "model": {"name_or_path": "m"}, "data": {"path": "d", "template": "{a}\r\n\t{b}"}}
    assert parse_config(tree).data.template == "{a}\r\n\t{b}"
    with pytest.raises(ConfigError, match=r"data.template: '{a}\\x1b"):
        parse_config({**tree, "data": {"path": "d", "template": "{a}\x1b[2J"}})


def test_rich_writes_no_control_character_but_its_own() -> None:
    for is_terminal in (True, False):
        text = io.StringIO()
        console = VisibleConsole(file=text, force_terminal=is_terminal, width=200)
        for hostile in HOSTILE:
            table = Table(title=hostile)
            table.add_column(hostile)
            table.add_row(hostile, style="green")
            console.print(table)
            console.print(hostile, markup=False, highlight=False)
        written = text.getvalue()
        assert is_seen(log_text(written))
        assert ("\x1b[32m" in written) is is_terminal  # colours are rich's own


def test_events_and_logs_of_ranks_are_shown_visible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = tmp_path / "events.jsonl"
    with shown(events):
        writer = EventWriter(events)
        for text in HOSTILE:
            writer("status", text=text)
            writer("scoring", done=1, total=1, note=text)
            EventHandler(writer).emit(logging.LogRecord("x", logging.INFO, "", 0, "logged %s", (text,), None))
    printed = capsys.readouterr()
    assert printed.err.count("logged ") == len(HOSTILE)
    assert is_seen(printed.err + printed.out, also="\t\n")


def test_lines_that_are_no_events_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = tmp_path / "events.jsonl"
    with shown(events):
        odd = (
            "x",
            "[]",
            "{}",
            '{"event": 3}',
            '{"event": "scoring", "done": "1", "total": 2}',
            '{"event": "scoring", "done": 1}',
        )
        events.write_text("\n".join([*odd, "[" * 100_000, '{"event": "status", "text": "the last"}', ""]))
    assert capsys.readouterr().err.splitlines() == ["the last"]


def test_an_argument_is_refused_before_anything_reads_it() -> None:
    for arguments in (["report", "x\x1b]0;t\x07"], ["--\x9b2J"], ["place", "x", "k=\u202e3"]):
        outcome = command(*arguments)
        assert_one_message(outcome, "the argument '")
        assert is_seen(outcome.err + outcome.out)


def test_what_other_packages_log_warn_and_raise_is_visible(tmp_path: Path) -> None:
    script = """
import logging, warnings
from plop_dist.values.visible import make_messages_visible
make_messages_visible()
logging.basicConfig(format="%(message)s")
text = "a\\x1b]0;x\\x07\\u202e"
logging.getLogger("other").warning("logged %s", text)
try:
    raise ValueError("caught " + text)
except ValueError:
    logging.getLogger("other").exception("x")
warnings.warn("warned " + text)
raise RuntimeError("raised " + text)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=tmp_path, timeout=60, check=False)
    shown = done.stderr.decode()
    for word in ("logged", "caught", "warned", "raised"):
        assert f"{word} a\\x1b]0;x\\x07\\u202e" in shown
    assert is_seen(shown)


def test_a_log_of_another_program_keeps_its_lines_without_colours_and_bars() -> None:
    assert log_text("\x1b[36m(Runner pid=1)\x1b[0m  1%|\r  2%|\r\nend\n") == "(Runner pid=1)  1%|\n  2%|\nend\n"
    assert visible(log_text("a\x1b]52;c;x\x07")) == "a\\x1b]52;c;x\\x07"


def test_records_are_plain_records_where_nothing_is_hidden(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("plop_dist.test").warning("%s of %d", "q_proj", 3)
    assert caplog.messages == ["q_proj of 3"]
