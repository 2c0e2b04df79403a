"""Whether each step's cost per module stays the same from a thousand modules to the largest models: ratios, measured.

The models are random Qwen3-MoE-like ones of tiny widths, with 128 experts in a layer as Qwen3-235B-A22B has, so that
what is measured is what each module costs beside its arithmetic.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from plop_dist.choose.decision import decide
from plop_dist.choose.explain import explain
from plop_dist.choose.place import place, placement_of
from plop_dist.config.schema import EstimatorConfig, PlacementConfig
from plop_dist.errors import WorkerError
from plop_dist.exporters.write import write_export
from plop_dist.rundir.layout import RunDir
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Scores

LAYERS = (6, 25, 94)  # 1,566, 6,525 and 24,534 hooked modules
_REPEATS = 3
_ENOUGH_SECONDS = 30.0
_EXPERTS, _WIDTH, _EXPERT_WIDTH = 128, 32, 16
_MICRO_BATCHES, _ROWS, _TOKENS = 8, 4, 64
_START = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


@dataclass(frozen=True)
class Scale:
    """What each step took at one size, in seconds, the shortest of a few runs.

    num_sites: modules with a hook; num_modules: projections with a score, two or three in each expert.
    report_peak_bytes: the most that the process of `plop-dist report` held.
    """

    num_sites: int
    num_modules: int
    seconds: dict[str, float]
    report_peak_bytes: int

    def per_module(self, step: str) -> float:
        """Return a step's seconds per hooked module."""
        return self.seconds[step] / self.num_sites


def measure_scale(program: Sequence[str], layers: Sequence[int] = LAYERS) -> list[Scale]:
    """Return the costs at each number of layers, smallest first; each size in a process of its own.

    program: the command that starts plop-dist; its `report` is measured as a user runs it.
    """
    found = []
    for num_layers in layers:
        with tempfile.TemporaryDirectory() as directory:
            found.append(measure_size(program, num_layers, Path(directory)))
    return found


def measure_size(program: Sequence[str], num_layers: int, directory: Path) -> Scale:
    """Return the costs of a model with this many layers, whose run directory is `directory`.

    The model lives and dies in a process of its own, as a user's does: Python's garbage collector would count it among
    what `place` costs, and a program started beside it inherits its peak memory.
    """
    run_dir = RunDir(directory)
    num_sites, num_modules, scoring = _in_a_process(_scoring, num_layers, run_dir)
    placing = _in_a_process(_placing, run_dir)
    seconds, peak = _report(program, run_dir)
    return Scale(num_sites, num_modules, scoring | placing | {"report": seconds}, peak)


def _in_a_process(call: Callable[..., Any], *args: Any) -> Any:
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *args).result()


def _scoring(num_layers: int, run_dir: RunDir) -> tuple[int, int, dict[str, float]]:
    """Write the scores; return the numbers of hooked and of scored modules, and the seconds."""
    model, run = _subject(num_layers)
    scores, seconds = _shortest(lambda: _score(model, run))
    scores.to_file(run_dir.scores)
    parts = {f"score: {name}": scores.timing[f"{name}_seconds"] for name in ("baseline", "forward")}
    return len(model.sites), len(scores.modules), {"score": seconds} | parts


def _placing(run_dir: RunDir) -> dict[str, float]:
    """Write exports, then the placement that `report` shows; return the seconds."""
    scores, seconds = Scores.from_file(run_dir.scores), {}
    # PEFT adapts gate and up of a stack of experts only together: every type is a choice that both can express.
    every_type = place(scores, policy="all", experts=True)
    every_type.to_file(run_dir.placement)
    for target in ("peft", "megatron-bridge"):
        _, seconds[f"export to {target}"] = _shortest(lambda target=target: _export(run_dir, target))
    half = every_type.num_trainable_parameters // 2
    placement, seconds["place, module budget, explained"] = _shortest(lambda: _place_by_module(run_dir, half))
    placement.to_file(run_dir.placement)
    return seconds


def _subject(num_layers: int) -> tuple[Any, Any]:
    """Return a random model as the collector sees it, and the pass over random tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from plop_dist.backends.hf.whole import whole_model
    from plop_dist.measure.protocols import MicroBatch
    from plop_dist.measure.run import Pass

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=128, hidden_size=_WIDTH, intermediate_size=_WIDTH, moe_intermediate_size=_EXPERT_WIDTH,
        num_hidden_layers=num_layers, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=_EXPERTS,
        num_experts_per_tok=8, tie_word_embeddings=False,
    )  # fmt: skip
    module = AutoModelForCausalLM.from_config(config).eval()
    batches = []
    for index in range(_MICRO_BATCHES):
        tokens = torch.randint(3, 128, (_ROWS, _TOKENS))
        samples = (torch.arange(_ROWS) + index * _ROWS)[:, None].expand(_ROWS, _TOKENS)
        batches.append(MicroBatch(tokens, torch.ones_like(tokens), samples, torch.arange(_TOKENS).expand(_ROWS, -1)))
    run = Pass(
        num_steps=_MICRO_BATCHES,
        micro_batches=lambda step: [batches[step]],
        num_samples=_MICRO_BATCHES * _ROWS,
        samples_after=lambda step: (step + 1) * _ROWS,
    )
    return whole_model(module, with_head=False), run


def _score(model: Any, run: Any) -> Scores:
    from plop_dist.measure.run import score_model

    return score_model(
        model,
        run,
        estimator=EstimatorConfig(),
        placement=PlacementConfig(),
        info={
            "model": {"name_or_path": "qwen3-moe-like", **model.describe()},
            "data": {"source": "random tokens"},
            "parallel": {"backend": "transformers"},
        },
    )


def _place_by_module(run_dir: RunDir, budget: int) -> Placement:
    scores = Scores.from_file(run_dir.scores)
    options = {"granularity": "module", "experts": True, "max_trainable_parameters": budget}
    decision = decide(scores, "budget", **options)
    placement = placement_of(decision)
    explain(scores, placement, decision)
    return placement


def _export(run_dir: RunDir, target: str) -> Any:
    return write_export(Placement.from_file(run_dir.placement), target, run_dir.exports, engine=None, widen=False)


def _report(program: Sequence[str], run_dir: RunDir) -> tuple[float, int]:
    """Return the seconds of `plop-dist report`, without those that the program takes to begin, and its peak memory."""
    command = [*program, "report"]
    _, begin = _shortest(lambda: _run([*command, "--help"]))
    peak, whole = _shortest(lambda: _run([*command, str(run_dir.path)]))
    return whole - begin, peak


def _run(command: Sequence[str]) -> int:
    """Run a command to its end and return its peak memory in bytes. Raises WorkerError where it fails."""
    # Linux lets a program that is started inherit the peak of who starts it: an empty interpreter does.
    done = subprocess.run([sys.executable, "-I", "-S", "-c", _START, *command], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise WorkerError(f"{' '.join(command)} ended with status {done.returncode}; its message is above.")
    return int(done.stdout) * 1024


def _shortest(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call returns and its shortest time over a few runs, fewer where each takes long."""
    shortest, spent, num_runs = float("inf"), 0.0, 0
    while True:
        started = time.perf_counter()
        result = call()
        took = time.perf_counter() - started
        shortest, spent, num_runs = min(shortest, took), spent + took, num_runs + 1
        if num_runs == _REPEATS or spent > _ENOUGH_SECONDS:
            return result, shortest
