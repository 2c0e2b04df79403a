"""A GRPO engine of its own, once installed, is started as a Ray job by `run`; a simulated verl stands in for it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from peft import PeftModel

from tests import payloads
from tests.launch.cluster_case import BIN, run
from tests.models import save_tiny, tiny

# What the launch script starts: prints its arguments, fails as often as it is told to, then leaves what verl leaves.
SIMULATED_VERL = """
import json, os, sys
from pathlib import Path
print("simulated verl", *sys.argv[1:], "in", os.getcwd(), "with Ray at", os.environ.get("RAY_ADDRESS"))
mark = Path(__file__).with_name("failed")
if not mark.exists():
    mark.touch()
    sys.exit(7)
given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
checkpoints = Path(given["trainer.default_local_dir"].strip('"'))
(checkpoints / "global_step_20" / "actor").mkdir(parents=True)
(checkpoints / "latest_checkpointed_iteration.txt").write_text("20")
with open(os.environ["VERL_FILE_LOGGER_PATH"], "w") as lines:
    for step in (1, 2, 3):
        numbers = {"critic/score/mean": step / 4, "actor/pg_loss": -step, "actor/lr": 1e-4}
        lines.write(json.dumps({"step": step, "data": numbers}) + "\\n")
    lines.write('{"step": 3, "data": {"val-core/reward": 1.0}}\\n')
"""
# verl's converter, as it writes an adapter: PEFT's two files below lora_adapter.
SIMULATED_MERGER = """
import sys
from pathlib import Path
from peft import LoraConfig, get_peft_model
from tests.models import tiny
import torch
target, source = (Path(sys.argv[sys.argv.index(name) + 1]) for name in ("--target_dir", "--local_dir"))
assert source.name == "actor" and source.is_dir(), source
types = (Path(__file__).parent / "types").read_text().split()
model = get_peft_model(tiny("llama"), LoraConfig(r=4, lora_alpha=8, target_modules=types, task_type="CAUSAL_LM"))
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.constant_(parameter, 0.5)
model.save_pretrained(target / "lora_adapter")
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "model")
    tree = {
        "run_dir": str(tmp_path / "run"),
        "model": {"name_or_path": str(tmp_path / "model"), "dtype": "float32"},
        "data": {"path": "builtin:arithmetic", "num_samples": 4, "max_length": 32},
        "placement": {"k": 2, "rank": 4, "alpha": 8},
        "train": {
            "method": "grpo",
            "engine": "verl",
            "answer_field": "number",
            "micro_batch_size": 4,
            "lr_scheduler": "constant",
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def simulated_engine(packages: Path) -> Path:
    """Write packages by the names of verl and vllm, and return the folder of the first."""
    trainer = packages / "verl" / "trainer"
    trainer.mkdir(parents=True)
    (packages / "vllm").mkdir()
    for directory in (trainer.parent, trainer, packages / "vllm"):
        (directory / "__init__.py").touch()
    (trainer / "main_ppo.py").write_text(SIMULATED_VERL)
    (trainer.parent / "model_merger.py").write_text(SIMULATED_MERGER)
    return trainer.parent


def run_with(packages: Path, config: Path) -> subprocess.CompletedProcess[str]:
    return run(BIN / "plop-dist", "run", config, PYTHONPATH=f"{packages}:{Path(__file__).parents[2]}")


@pytest.mark.slow
def test_an_installed_engine_is_started_and_its_exit_status_is_that_of_the_run(tmp_path: Path, config: Path) -> None:
    packages, train = tmp_path / "packages", tmp_path / "run" / "train"
    verl = simulated_engine(packages)
    (verl / "types").write_text("o_proj gate_proj")

    failed = run_with(packages, config)
    assert failed.returncode == 7, failed.stdout + failed.stderr
    assert "simulated verl" in failed.stdout
    assert "Traceback" not in failed.stderr
    assert f"{train / 'verl' / 'launch.sh'} ended with status 7" in failed.stderr.splitlines()[-1]
    assert not (train / "job.json").exists()

    types = json.loads((tmp_path / "run" / "placement.json").read_text())["module_types"]
    (verl / "types").write_text(" ".join(types))
    again = run_with(packages, config)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "train/job.json is missing" in again.stderr
    job = json.loads((train / "job.json").read_text())
    assert job["exit_status"] == 0
    (line,) = [line for line in again.stdout.splitlines() if line.startswith("simulated verl")]
    assert f"actor_rollout_ref.model.path={tmp_path / 'model'}" in line.replace("'", "").replace('"', "")
    assert f"in {job['directory']} with Ray at " in line
    assert not line.endswith("None"), "the job was not told of the Ray that it runs in"

    summary = json.loads((train / "summary.json").read_text())
    assert (summary["reward_first"], summary["reward_last"], summary["num_steps"]) == (0.25, 0.75, 3)
    log = [json.loads(line) for line in (train / "log.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["reward"], entry["loss"]) for entry in log] == [
        (1, 0.25, -1),
        (2, 0.5, -2),
        (3, 0.75, -3),
    ]
    adapted = PeftModel.from_pretrained(tiny("llama"), train / "adapter")
    learned = {name: value for name, value in adapted.named_parameters() if ".lora_B" in name}
    assert {name.split(".")[-4] for name in learned} == set(types)
    assert all(bool((value == 0.5).all()) for value in learned.values())
    assert "0.75" in (tmp_path / "run" / "report.html").read_text()

    kept = run_with(packages, config)
    assert kept.returncode == 0, kept.stderr
    assert "simulated verl" not in kept.stdout, "what has succeeded ran again"

    # What somebody else has written there is neither run nor gone on from.
    marker = tmp_path / "marker"
    (tmp_path / "theirs.sh").write_text(f"mkdir {marker}\n")
    job = {"script": str(tmp_path / "theirs.sh"), "directory": job["directory"]}
    (train / "summary.json").write_text(json.dumps({**summary, "job": job}))
    shutil.rmtree(tmp_path / "run" / "exports")
    exported = run_with(packages, config)
    assert exported.returncode == 0, exported.stderr
    assert not marker.exists()
    assert payloads.fires(marker, lambda: subprocess.run(["sh", job["script"]], check=True))
    payloads.torch_file(train / "verl" / "checkpoints" / "global_step_1" / "data.pt", marker)
    (train / "job.json").unlink()
    refused = run_with(packages, config)
    assert refused.returncode == 2, refused.stderr
    assert "holds checkpoints of an earlier job, from which verl would go on" in refused.stderr.splitlines()[-1]
    assert not marker.exists()
