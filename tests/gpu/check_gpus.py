"""What no CPU can show, run on a machine with GPUs: kernels, NCCL, context parallelism, FP8, memory; one table.

python -m tests.gpu.check_gpus [--only NAME ...] [--folder FOLDER]

Every row scores a small random model in some layout and compares its gains with those of one process of transformers
on the same device, in float32, or runs one of our commands. The table on standard output is made to be pasted whole.
Rows of two ranks need two GPUs; with one they are named as not run.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from plop_dist.values.scores import Scores
from plop_dist.values.versions import versions
from tests.models import save_tiny

# Sizes that Transformer Engine's kernels take: multiples of 32, heads of 32 features.
_SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
          "num_key_value_heads": 4, "head_dim": 32}  # fmt: skip
_LATENT = {**_SIZES, "num_key_value_heads": 8, "head_dim": 32, "kv_lora_rank": 64, "q_lora_rank": 96,
           "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 4,
           "num_experts_per_tok": 2, "moe_intermediate_size": 128, "n_shared_experts": 1, "first_k_dense_replace": 1,
           "n_group": 1, "topk_group": 1}  # fmt: skip
_MODELS = {
    "dense": ("llama", _SIZES),
    "experts": ("qwen3_moe", {**_SIZES, "moe_intermediate_size": 128}),
    "latent": ("deepseek_v3", _LATENT),
}
_MEGATRON, _DEEPSPEED = "parallel.backend=megatron", "parallel.backend=deepspeed"
_TIME_LIMIT_S = 900
_EXACT, _ROUNDED, _FP8 = 1e-4, 3e-2, 2e-1  # of a gain, in float32, bfloat16 and FP8


@dataclass(frozen=True)
class Check:
    """A row. command: of plop-dist, or a module of ours. tolerance: of gains, None where only success is looked at."""

    name: str
    model: str = "dense"
    num_ranks: int = 1
    overrides: Sequence[str] = ()
    command: str = "score"
    tolerance: float | None = _EXACT


@dataclass(frozen=True)
class Row:
    """What came of a check. passed: None where it was not run. said: the worst gain's error, or why there is none."""

    check: Check
    passed: bool | None
    said: str
    seconds: float = field(default=0.0)


def _megatron(name: str, num_ranks: int, *axes: str, model: str = "dense", bf16: bool = False) -> Check:
    overrides = [_MEGATRON, *(f"parallel.{axis}" for axis in axes)]
    if bf16:
        return Check(name, model, num_ranks, [*overrides, "model.dtype=bfloat16"], tolerance=_ROUNDED)
    return Check(name, model, num_ranks, overrides)


def _trained(name: str, num_ranks: int, *overrides: str) -> Check:
    return Check(name, num_ranks=num_ranks, overrides=overrides, command="run", tolerance=None)


_SP = "sequence_parallel=true"
_SFT = ("train.method=sft", "train.max_steps=10")
CHECKS = (
    Check("transformers dp2", num_ranks=2, overrides=["parallel.dp=2"]),
    Check("transformers tp2", num_ranks=2, overrides=["parallel.tp=2"]),
    Check("deepspeed zero3", num_ranks=2, overrides=[_DEEPSPEED, "parallel.dp=2", "parallel.zero_stage=3"]),
    Check("deepspeed tp2", num_ranks=2, overrides=[_DEEPSPEED, "parallel.tp=2"]),
    _megatron("megatron", 1),
    _megatron("megatron bf16", 1, bf16=True),
    _megatron("megatron experts", 1, model="experts"),
    _megatron("megatron latent", 1, model="latent"),
    _megatron("megatron tp2 sp", 2, "tp=2", _SP),
    _megatron("megatron tp2 sp bf16", 2, "tp=2", _SP, bf16=True),
    _megatron("megatron pp2", 2, "pp=2"),
    _megatron("megatron cp2", 2, "cp=2"),
    _megatron("megatron experts ep2", 2, "dp=2", "ep=2", model="experts"),
    _megatron("megatron experts tp2 sp ep2", 2, "tp=2", "ep=2", _SP, model="experts"),
    _megatron("megatron latent tp2 sp", 2, "tp=2", _SP, model="latent"),
    # Its kernels take numbers of tokens that 8 divides.
    Check("fp8", overrides=[_MEGATRON, "model.dtype=bfloat16", "data.batch_size=8"], command="tests.gpu.fp8",
          tolerance=_FP8),
    _trained("sft", 1, *_SFT),
    _trained("sft megatron", 1, _MEGATRON, *_SFT),
    _trained("sft megatron tp2 sp", 2, _MEGATRON, "parallel.tp=2", f"parallel.{_SP}", *_SFT),
    _trained("grpo", 1, "train.method=grpo", "train.answer_field=number", "train.max_steps=2"),
    Check("bench", command="bench", tolerance=None),
)  # fmt: skip


def run_checks(folder: Path, names: Sequence[str] = (), report: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """Return a row for each check of these names, or for all. Writes models, configurations and runs below folder."""
    chosen = [check for check in CHECKS if not names or check.name in names]
    references = {}
    for model in dict.fromkeys(check.model for check in chosen):
        family, fields = _MODELS[model]
        save_tiny(family, folder / model, **fields)
        _run(Check(f"reference {model}", model), folder)
        references[model] = _scores(folder, f"reference {model}")
    rows = []
    for check in chosen:
        began = time.monotonic()
        if 0 < torch.cuda.device_count() < check.num_ranks:
            rows.append(Row(check, None, f"needs {check.num_ranks} GPUs"))
            report(rows[-1])
            continue
        try:
            _run(check, folder)
            passed, said = True, "done"
            if check.tolerance is not None:
                worst = _worst(_scores(folder, check.name), references[check.model])
                passed, said = worst <= check.tolerance, f"{worst:.1e}"
        except (subprocess.SubprocessError, ValueError) as error:
            passed, said = False, str(error)
        rows.append(Row(check, passed, said, time.monotonic() - began))
        report(rows[-1])
    return rows


def _run(check: Check, folder: Path) -> None:
    """Run a check's command. Raises SubprocessError, or ValueError with the last line that a failed one wrote."""
    tree = {"model": {"name_or_path": str(folder / check.model), "dtype": "float32"},
            "data": {"path": "builtin:arithmetic", "num_samples": 32, "batch_size": 4},
            "estimator": {"baseline": "closed_form"}}  # fmt: skip
    config = folder / f"{check.model}.yaml"
    config.write_text(json.dumps(tree))
    target = ["plop_dist.cli", check.command] if "." not in check.command else [check.command]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={check.num_ranks}"] if check.num_ranks > 1 else []
    overrides = [*check.overrides, f"run_dir={folder / 'runs' / check.name}"]
    command = [sys.executable, *launcher, "-m", *target, str(config), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIME_LIMIT_S, check=False)
    (folder / f"{check.name}.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise ValueError(f"exit status {done.returncode}: {lines[-1] if lines else ''}")


def _scores(folder: Path, name: str) -> Scores:
    return Scores.from_file(folder / "runs" / name / "scores.json")


def _worst(found: Scores, expected: Scores) -> float:
    """Return the largest relative error of a gain. Raises ValueError where other modules or tokens were scored."""
    have, want = ({module.fqn: module for module in scores.modules} for scores in (found, expected))
    if have.keys() != want.keys():
        raise ValueError(f"other modules: {sorted(have.keys() ^ want.keys())[:3]}")
    return max(abs(have[fqn].gain / want[fqn].gain - 1) for fqn in want)


def table(rows: Sequence[Row]) -> str:
    """Return the table for people, with what it was made on."""
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] or ["no CUDA device"]
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [f"{', '.join(names)}; CUDA {torch.version.cuda}; {platform.machine()}; {packages}", "",
             "| check | result | worst gain | seconds |", "| --- | --- | --- | --- |"]  # fmt: skip
    for row in rows:
        said = " ".join(row.said.split()).replace("|", "/")[:200]
        result = {None: "not run", True: "passed", False: "FAILED"}[row.passed]
        lines.append(f"| {row.check.name} | {result} | {said} | {row.seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run the checks that the arguments name and print the table; exit status 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=(), choices=[check.name for check in CHECKS], metavar="NAME")
    parser.add_argument("--folder", type=Path, help="keep models, runs and logs here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = run_checks(folder, given.only, lambda row: print(row.check.name, row.said, file=sys.stderr, flush=True))
        print(table(rows))
    sys.exit(any(row.passed is False for row in rows))


if __name__ == "__main__":
    main()
