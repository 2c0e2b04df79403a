"""Run directories from somebody who means harm: no command runs what is in them, gives secrets away or hangs.

PLOP_DIST_HOSTILE_CASES says how many (`make test-fuzz`: 500), PLOP_DIST_FUZZ_SEED which ones, PLOP_DIST_FUZZ_ONLY the
number of a single one. A case is a function of (seed, number); one that fails is kept, and named with what was done.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import jinja2
import pytest
import torch
import yaml

from tests import payloads
from tests.fuzz.commands import Outcome, digests, fault, limited_memory, run_here
from tests.fuzz.hostile import ENV_SECRET, TOKEN, Trap, commands_for, make_hostile, texts
from tests.fuzz.pages import Page
from tests.fuzz.test_fuzz import report, write_comparison, write_config
from tests.models import save_tiny

NUM_CASES = int(os.environ.get("PLOP_DIST_HOSTILE_CASES", 12))
SEED = os.environ.get("PLOP_DIST_FUZZ_SEED", "0")
ONLY = os.environ.get("PLOP_DIST_FUZZ_ONLY")

# What rich writes of its own on a terminal: colours, the cursor hidden and shown, a line taken back.
_OWN_ESCAPES = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[2K|\x1b\[\d*A|\r")
_DIRECTIONS = frozenset("\u200b\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600, method="thread")]


@pytest.fixture(scope="module", autouse=True)
def surroundings() -> Iterator[None]:
    """No network, one thread, no allocation that takes the machine down, and a secret in the environment."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, limited_memory():
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setenv(ENV_SECRET, "of-the-environment-77aa")
        yield
    torch.set_num_threads(threads)


HANDED = {
    "method": "grpo",
    "engine": "verl",
    "lr_scheduler": "constant",
    "gradient_accumulation_steps": 4,
    "max_length": 128,  # verl is asked for no prompt that is longer, and the longest has 113 tokens
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and two finished runs: one that has trained, one that was handed to another trainer."""
    folder = tmp_path_factory.mktemp("base")
    model = save_tiny("llama", folder / "model")
    for name, train in (("trained", {"method": "sft", "max_length": 24}), ("handed", HANDED)):
        (folder / name).mkdir()
        config = write_config(folder / name, model)
        tree = yaml.safe_load(config.read_text())
        tree["train"] = {**train, "max_steps": 2, "save_steps": 1, "micro_batch_size": 1}
        tree["train"] |= {"eval_samples": 2, "answer_field": "number"}
        tree |= {"placement": {"k": 2, "rank": 2}, "export": {"targets": ["peft", "verl", "trl"]}}
        config.write_text(yaml.safe_dump(tree))
        for command in (("run", str(config)), ("report", str(folder / name / "run"))):
            if command[0] == "report":
                write_comparison(folder / name / "run")
            outcome = run_here(command)
            assert outcome.status == 0, outcome
        record = folder / name / "run" / "ray" / "0" / "error-rank-0.json"
        record.parent.mkdir(parents=True)
        record.write_text('{"rank": 0, "kind": "DataError", "message": "no rows", "user": true}')
    return folder


def test_the_runs_have_a_comparison_on_their_page(base: Path) -> None:
    for name in ("trained", "handed"):
        assert "Does the placement pay?" in (base / name / "run" / "report.html").read_text()


def test_a_hostile_run_directory_does_no_harm(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tags = Page((base / "trained" / "run" / "report.html").read_text()).tags
    findings = []
    for number in range(NUM_CASES) if ONLY is None else [int(ONLY)]:
        rng = Random(f"{SEED}/hostile/{number}")
        folder = tmp_path / str(number)
        shutil.copytree(base / rng.choice(("trained", "trained", "handed")) / "run", folder / "run", symlinks=True)
        trap = Trap(folder / "mark", folder / "outside", "of-a-file-88bb")
        fill_outside(trap)
        monkeypatch.chdir(folder)
        monkeypatch.delenv("FORCE_COLOR", raising=False)
        if rng.random() < 0.3:
            monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
        done = make_hostile(folder / "run", rng, trap)
        found = examine(commands_for(folder / "run", rng), folder, trap, tags)
        findings += [f"case {number}: {'; '.join(done)}\n  {finding}" for finding in found]
        if not found:
            shutil.rmtree(folder)
    report(findings)


def fill_outside(trap: Trap) -> None:
    """Write what the victim has beside the run, in forms that the files of a run have too."""
    trap.outside.mkdir()
    for name, content in {
        "key": trap.secret,
        "yaml": f"model: {{name_or_path: {trap.secret}}}\ndata: {{path: {trap.secret}}}\n",
        "json": f'{{"token": "{trap.secret}"}}',
        "log": f'{{"step": 1, "loss": 2.0, "note": "{trap.secret}"}}\n',
    }.items():
        (trap.outside / name).write_text(content)


def examine(commands: list[tuple[str, ...]], folder: Path, trap: Trap, tags: set[str]) -> list[str]:
    """Run the commands and return what is wrong, each with the command that shows it."""
    found = []
    before = digests(trap.outside)
    for command in commands:
        print(f"{folder.name}: {' '.join(command)!r:.300}", flush=True)  # shown where a command cannot be stopped
        outcome = run_here(command)
        wrong = fault(outcome) or _harm(outcome, folder, trap)
        if wrong is None and command[0] == "report" and outcome.status == 0:
            wrong = _acts(Page((folder / "run" / "report.html").read_text()), tags)
        if digests(trap.outside) != before:
            wrong = f"what lies outside of the run was changed: {sorted(trap.outside.rglob('*'))}"
        if wrong is not None:
            found.append(f"plop-dist {' '.join(command)[:300]!r}\n{wrong}")
            break
    return found


def _harm(outcome: Outcome, folder: Path, trap: Trap) -> str | None:
    """Return what a command has let out of the run directory, or None."""
    if trap.marker.exists():
        return f"a command in the run directory has run; printed: {outcome.err[-500:]!r}"
    printed = (
        _OWN_ESCAPES.sub("", outcome.out + outcome.err) if "FORCE_COLOR" in os.environ else outcome.out + outcome.err
    )
    odd = [at for at, character in enumerate(printed) if _is_odd(character)]
    if odd:
        return f"a control character was printed: {printed[max(odd[0] - 80, 0) : odd[0] + 80]!r}"
    secret = os.environ[ENV_SECRET]
    if secret in printed:
        return f"a secret was printed: {printed[:1000]!r}"
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file() or trap.outside in path.parents:
            continue
        content = path.read_bytes()
        for text in (secret, trap.secret):
            if text.encode() in content:
                return f"a secret was written to {path.relative_to(folder)}"
    return None


def _acts(page: Page, expected: set[str]) -> str | None:
    """Return which elements the page has that one of a good run has not, or what stands where it would act."""
    odd, acting = page.tags - expected - {"p", "ul", "li", "em", "small"}, page.acting(TOKEN)
    return f"report.html: elements {sorted(odd)}, attributes {acting[:3]}" if odd or acting else None


def _is_odd(character: str) -> bool:
    return (unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t") or character in _DIRECTIONS


@pytest.mark.parametrize("name", ["shell", "python", "yaml", "jinja", "pickle"])
def test_what_is_hidden_there_would_run(name: str, tmp_path: Path) -> None:
    trap = Trap(tmp_path / "mark", tmp_path / "outside", "")
    every = texts(trap)

    def run() -> Any:
        if name == "shell":
            return subprocess.run(["sh", "-c", f"echo {every[0]}"], capture_output=True, timeout=30)
        if name == "python":
            return eval(next(text for text in every if text.startswith("__import__")))
        if name == "yaml":
            return yaml.unsafe_load(next(text for text in every if text.startswith("!!python/object/apply")))
        if name == "jinja":
            return jinja2.Template(next(text for text in every if "cycler" in text)).render()
        return torch.load(payloads.torch_file(tmp_path / "x.pt", trap.marker), weights_only=False)

    assert payloads.fires(trap.marker, run), f"{sys.version}: the payload is a dud"
