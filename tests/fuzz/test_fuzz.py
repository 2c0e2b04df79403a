"""Bad files and arguments by the thousand: none escapes as an exception, waits, or costs an earlier result.

PLOP_DIST_FUZZ_CASES says how many cases there are in all (200; `make test-fuzz`: 2,000), PLOP_DIST_FUZZ_SEED which
ones, PLOP_DIST_FUZZ_ONLY the number of a single one. A case is a function of (seed, kind, number); one that fails is
kept, and named with what escaped.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml

from plop_dist.cli import main
from plop_dist.values.scores import Scores
from tests.compare.test_result import made
from tests.fuzz.commands import Outcome, digests, fault, limited_memory, run_apart, run_here
from tests.fuzz.folders import folder_case
from tests.fuzz.inputs import (
    Case,
    adapter_case,
    comparison_case,
    config_case,
    override_case,
    placement_case,
    scores_case,
)
from tests.models import save_tiny

NUM_CASES = int(os.environ.get("PLOP_DIST_FUZZ_CASES", 200))
SEED = os.environ.get("PLOP_DIST_FUZZ_SEED", "0")
ONLY = os.environ.get("PLOP_DIST_FUZZ_ONLY")
_MAX_SHOWN = 12
_EACH_APART = 100  # one case in so many runs in a process of its own, which takes seconds to start

# Shares of all cases.
RUN_KINDS: dict[str, tuple[Callable[[Path, Random], Case], float]] = {
    "scores": (scores_case, 0.2),
    "placement": (placement_case, 0.2),
    "adapter": (adapter_case, 0.15),
    "config": (config_case, 0.2),
    "override": (override_case, 0.1),
    "comparison": (comparison_case, 0.05),
}
FOLDER_SHARE = 0.1
FAMILIES = ("llama", "qwen3_moe", "phi3", "gpt2")

# Each command has a limit of its own, by SIGALRM.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600, method="thread")]


@pytest.fixture(scope="module", autouse=True)
def surroundings() -> Any:
    """No network, one thread, and no allocation that takes the machine down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, limited_memory():
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with FAMILY/model and FAMILY/run, which is scored and placed, for each family; MoE weights in shards."""
    folder = tmp_path_factory.mktemp("base")
    for family in FAMILIES:
        model = save_tiny(family, folder / family / "model", shard_size="60KB" if family == "qwen3_moe" else None)
        config = write_config(folder / family, model)
        for command in (("score", str(config)), ("place", str(folder / family / "run"))):
            outcome = run_here(command)
            assert outcome.status == 0, outcome
        adapter = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "c_attn"]}
        (folder / family / "run" / "adapter_config.json").write_text(json.dumps(adapter))
        write_comparison(folder / family / "run")
    return folder


def write_comparison(run: Path) -> None:
    """Write a compare.json that belongs to the scores of a run, as `plop-dist compare` leaves it."""
    (run / "compare.json").write_text(json.dumps(made(scores_digest=Scores.from_file(run / "scores.json").digest)))


def write_config(folder: Path, model: Path) -> Path:
    tree = {
        "run_dir": str(folder / "run"),
        "model": {"name_or_path": str(model)},
        "data": {"path": "builtin:arithmetic", "num_samples": 3, "max_length": 24, "batch_size": 2},
        "estimator": {"num_directions": 4},
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    return config


def numbers(share: float) -> range:
    count = max(1, round(NUM_CASES * share))
    return range(count) if ONLY is None else range(int(ONLY), int(ONLY) + 1)


def test_names_that_a_terminal_cannot_write_are_shown(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["plop-dist", "diff", str(base / "llama" / "run"), str(base / "odd.json")])
    adapter = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "caf\u00e9"]}
    (base / "odd.json").write_text(json.dumps(adapter))
    with contextlib.suppress(SystemExit):
        main()
    out.seek(0)
    assert "caf\\xe9" in out.read()


@pytest.mark.parametrize("kind", RUN_KINDS)
def test_damaged_input_of_a_run(kind: str, base: Path, tmp_path: Path) -> None:
    damage, share = RUN_KINDS[kind]
    findings = []
    for number in numbers(share):
        rng = Random(f"{SEED}/{kind}/{number}")
        family = rng.choice(FAMILIES)
        folder = tmp_path / str(number)
        shutil.copytree(base / family / "run", folder / "run")
        write_config(folder, base / family / "model")
        case = damage(folder / "run", rng)
        findings += examine(case, folder, f"{kind} {number}", number % _EACH_APART == 7)
    report(findings)


def test_damaged_model_folder(base: Path, tmp_path: Path) -> None:
    findings = []
    for number in numbers(FOLDER_SHARE):
        rng = Random(f"{SEED}/folder/{number}")
        folder = tmp_path / str(number)
        shutil.copytree(base / rng.choice(FAMILIES), folder)  # with the results of when it was whole
        config = write_config(folder, folder / "model")
        case = folder_case(folder / "model", config, rng)
        findings += examine(case, folder, f"folder {number}", number % _EACH_APART == 7)
    report(findings)


def examine(case: Case, folder: Path, name: str, apart: bool) -> list[str]:
    """Run a case and return what is wrong, each with the command that shows it; the folder is kept if anything is."""
    findings = []
    for command in case.commands:
        print(f"{name}: {' '.join(command)!r:.300}", flush=True)  # shown where a command cannot be stopped
        before = digests(folder)
        outcome: Outcome = (run_apart if apart else run_here)(command)
        wrong = fault(outcome) or _harm(command, outcome, before, digests(folder))
        if wrong is not None:
            shown = " ".join(command)
            findings.append(f"{name}: plop-dist {shown[:300]!r}\n{wrong}")
    if not findings:
        shutil.rmtree(folder)
    return findings


def _harm(command: tuple[str, ...], outcome: Outcome, before: dict[str, str], after: dict[str, str]) -> str | None:
    """Return which files a command has changed that it must not change, or has left behind, or None."""
    # Weights with NaN are an error that comes with the scores of all other modules.
    is_done = outcome.status == 0 or "they were left out of scores.json" in outcome.err
    writes = _WRITES.get(command[0], ()) if is_done else LOGS
    changed = [path for path in before if before[path] != after.get(path) and not path.startswith(writes)]
    litter = [path for path in after if "/." in path]
    if not changed and not litter:
        return None
    return f"changed {changed}, left behind {litter}; exit status {outcome.status}: {outcome.err[-500:]}"


LOGS = ("run/events.jsonl",)
# What each command writes when it is done.
_WRITES = {
    "place": ("run/placement.json",),
    "export": ("run/exports/",),
    "report": ("run/report.html",),
    "score": ("run/",),
}


def report(findings: list[str]) -> None:
    shown = "\n\n".join(findings[:_MAX_SHOWN])
    assert not findings, f"{len(findings)} findings (seed {SEED}):\n\n{shown}"
