"""Every text that a run directory holds is text on the page: nothing of it acts, in a parser and in a real browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import plop_dist
from plop_dist.report import write_report
from plop_dist.rundir.layout import RunDir
from plop_dist.values.files import content_hash
from tests.choose.cases import LLAMA, make_scores
from tests.fuzz.pages import Page

FIRE = "document.documentElement.setAttribute('data-fired','yes')"
ATTACKS = (
    f"</script><script>{FIRE}</script>",
    f"<img src=x onerror=\"{FIRE}\">",
    f"\"><svg onload=\"{FIRE}\"></svg>",
    f"' onmouseover='{FIRE}' autofocus onfocus='{FIRE}",
    f"</style></title></textarea></pre><script>{FIRE}</script>",
    f"--></template><body onload=\"{FIRE}\"><iframe srcdoc='<script>parent.{FIRE}</script>'></iframe>",
    f"<a href=\"javascript:{FIRE}\" id=x>x</a><script>setTimeout(() => x.click())</script>",
    f"{{{{ '<script>{FIRE}</script>' | safe }}}}",
    f"\\u003cscript\\u003e{FIRE}\\u003c/script\\u003e",
    f"]]><script>{FIRE}</script>",
)  # fmt: skip
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def hostile_run(directory: Path, attack: str) -> Path:
    """Fill a run directory, with the attack in every text that the report could show."""
    directory.mkdir()
    scores = make_scores({f"{kind}{attack}".replace(".", "_"): nfn for kind, nfn in LLAMA.items()}, name=attack)
    scores.to_file(directory / "scores.json")
    plop_dist.place(scores).to_file(directory / "placement.json")
    for name in ("scores.json", "placement.json"):
        tree = json.loads((directory / name).read_text())
        plant(tree, attack)
        (directory / name).write_text(json.dumps(tree))
    placement = content_hash(directory / "placement.json")
    log = [{"step": step, "loss": 2.0, "reward": 1.0, "nfn": {attack: 0.9, f"o_proj{attack}": 1.0}, attack: attack,
            "note": attack} for step in range(4)]  # fmt: skip
    summary = {"method": attack, "held_out_before": 2.0, "held_out_after": 1.4, "num_steps": 3, "adapter": attack,
               "note": attack, attack: attack, "placement": placement}  # fmt: skip
    (directory / "train").mkdir()
    (directory / "train" / "log.jsonl").write_text("\n".join([*map(json.dumps, log), attack]) + "\n")
    (directory / "train" / "summary.json").write_text(json.dumps(summary))
    (directory / "config.yaml").write_text(f"data: {attack}\n# {attack}\n")
    (directory / "command.txt").write_text(f"plop-dist run {attack}\n")
    (directory / "events.jsonl").write_text(json.dumps({"event": attack, "text": attack}) + "\n")
    target = directory / "exports" / attack.replace("/", "_")[:200]
    target.mkdir(parents=True)
    record = {"flags": [attack], "notes": [attack], "widened": [attack], "placement": placement}
    (target / "export.json").write_text(json.dumps(record))
    return directory


def plant(tree: Any, attack: str) -> None:
    """Put the attack into every value that says only what was measured and how."""
    for name in ("model", "data", "estimator", "parallel", "versions", "timing"):
        if isinstance(tree.get(name), dict):
            texts = {key: attack for key, value in tree[name].items() if isinstance(value, str)}
            tree[name] = {**tree[name], **texts, attack: attack}
    if isinstance(tree.get("diagnostics"), list):
        tree["diagnostics"].append(attack)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(hostile_run(tmp_path_factory.mktemp("plain") / "run", "plain"))


def page_of(directory: Path) -> Page:
    return Page(write_report(RunDir(directory)).read_text())


@pytest.mark.parametrize("number", range(len(ATTACKS)))
def test_a_parser_finds_no_element_that_a_plain_run_has_not(number: int, tmp_path: Path, plain: Page) -> None:
    page = page_of(hostile_run(tmp_path / "run", ATTACKS[number]))
    assert page.counts["script"] == plain.counts["script"]
    assert page.counts["style"] == plain.counts["style"]
    assert page.tags <= plain.tags
    assert page.acting("data-fired") == []
    assert ATTACKS[number] in page.text, "the attack is not on the page at all"


@pytest.mark.rare
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_runs_nothing_of_it(tmp_path: Path) -> None:
    control = tmp_path / "control.html"
    control.write_text(f'<!doctype html><p>x</p><img src=x onerror="{FIRE}">')
    assert has_fired(control, tmp_path), "the control page does not fire: this browser shows nothing"
    for number, attack in enumerate(ATTACKS):
        directory = hostile_run(tmp_path / str(number), attack)
        assert not has_fired(write_report(RunDir(directory)), tmp_path), attack


def has_fired(page: Path, directory: Path) -> bool:
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000",
               f"--user-data-dir={directory / 'profile'}", "--dump-dom", page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    start = done.stdout[: done.stdout.find("<head")]
    assert "<html" in start, done.stderr[-2000:]
    return 'data-fired="yes"' in start
