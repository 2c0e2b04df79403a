"""The example scripts run as they are, and with a user's own model and data on the lines that are commented."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.installed import needs_bridge
from tests.launch.cluster_case import ROOT, free_ports, run
from tests.models import save_tiny

EXAMPLES = ROOT / "launchers" / "examples"
LIGHTNING = ROOT / ".cache" / "hosts" / "lightning"  # apart from .venv: pins in tests/hosts


def check_adapter(directory: Path, printed: str) -> None:
    """Assert that a script ended with an adapter of the types it has named, which has learned something."""
    config = json.loads((directory / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 3
    assert all(name in printed for name in config["target_modules"])
    weights = load_file(directory / "adapter_model.safetensors")
    assert all(bool(weight.any()) for weight in weights.values())
    losses = [float(loss) for loss in re.findall(r"loss'?:? '?(\d+\.\d+)", printed)]
    assert len(losses) >= 12
    assert losses[-1] < losses[0]


def execute(script: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    done = run(sys.executable, script, directory, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pytorch_loop", "trl_sft"])
def test_an_example_runs_as_it_is(tmp_path: Path, name: str) -> None:
    check_adapter(tmp_path / "adapter", execute(EXAMPLES / f"{name}.py", tmp_path / "adapter").stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pytorch_loop", "trl_sft"])
def test_an_example_takes_a_users_own_model_and_data(tmp_path: Path, name: str) -> None:
    """The commented lines, with the names of a model and a file that are here, in place of what the script makes up."""
    save_tiny("llama", tmp_path / "model")
    rows = [json.dumps({"text": f"{i} and {7 * i}", "question": f"{i} and {7 * i}"}) for i in range(128)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    text = (EXAMPLES / f"{name}.py").read_text()
    text = re.sub(
        r"tokenizer = ByT5Tokenizer\(\)\nmodel = LlamaForCausalLM\(.*?\n\)  # fmt: skip\n", "", text, flags=re.S
    )
    text = re.sub(r"^(texts|dataset) = .*\n", "", text, flags=re.M)
    own, count = re.subn(r"^# (\w+ = (?:Auto\w+\.from_pretrained|load_dataset)\()", r"\1", text, flags=re.M)
    assert count == 3
    own = own.replace('"meta-llama/Llama-3.2-1B"', repr(str(tmp_path / "model")))
    file = repr(str(tmp_path / "rows.jsonl"))
    own = own.replace('"openai/gsm8k", "main"', f'"json", data_files={file}').replace('"rows.jsonl"', file)
    classes = "from transformers import AutoModelForCausalLM, AutoTokenizer\nfrom datasets import load_dataset\n"
    own = own.replace("import plop_dist\n", f"import plop_dist\n{classes}", 1)
    script = tmp_path / f"{name}.py"
    script.write_text(own)
    check_adapter(tmp_path / "adapter", execute(script, tmp_path / "adapter").stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["trl_sft", "accelerate_loop", "fsdp2_loop", "lightning_fit", "deepspeed_zero3",
     pytest.param("bridge_recipe", marks=needs_bridge)],
)  # fmt: skip
def test_an_example_runs_on_two_ranks(tmp_path: Path, name: str) -> None:
    if name == "lightning_fit" and not LIGHTNING.exists():
        pytest.skip("Lightning is not installed in .cache/hosts/lightning; make test does it")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    done = run(
        *launcher,
        "--master-port",
        free_ports(1)[0],
        EXAMPLES / f"{name}.py",
        tmp_path / "adapter",
        PYTHONPATH=f"{ROOT}{os.pathsep}{LIGHTNING}",
    )
    assert done.returncode == 0, done.stderr
    assert len(set(re.findall("LoRA on .*", done.stdout))) == 1
    check_adapter(tmp_path / "adapter", done.stdout)


def test_the_examples_are_listed_with_the_lines_that_they_add() -> None:
    call = re.compile(
        r"^[^#\n]*\b(plop_dist\.(score|place|attach|adapt_for_accelerate|lightning_callback)|MegatronBridgePeft"
        r"|placement\.apply)\(",
        flags=re.M,
    )
    added = {path.name: str(len(call.findall(path.read_text()))) for path in EXAMPLES.glob("*.py")}
    assert all(1 <= int(count) <= 3 for count in added.values())
    listed = re.findall(r"^\| \[(\w+\.py)\]\(\1\) \|.*\| (\d+) \|$", (EXAMPLES / "README.md").read_text(), flags=re.M)
    assert dict(listed) == added
    page = (ROOT / "README.md").read_text()
    table = re.search(r"^\| `placement.apply` on .* lines added .*\n\|[ |-]+\n((?:\|.*\n)+)", page, flags=re.M)
    assert table is not None
    linked = re.findall(r"\| \[(\d+)\]\(launchers/examples/(\w+\.py)\) \|$", table[1], flags=re.M)
    assert {script: count for count, script in linked} == added
    counts = re.findall(r"\| \[?(\d+)(?:\]\(.*\))? \|$", table[1], flags=re.M)
    assert len(counts) == len(table[1].splitlines())
    assert all(int(count) <= 3 for count in counts)
