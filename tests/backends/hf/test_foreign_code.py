"""Code that comes with a model, or that transformers would fetch from a hub for it, runs when it is asked for alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.integrations import hub_kernels

from plop_dist.backends.hf.load import load_hf_config
from plop_dist.config.schema import ModelConfig
from plop_dist.errors import ModelError
from tests import payloads
from tests.models import save_tiny

ROOT = Path(__file__).parents[3]
KERNELS = """
class Anything:
    def __init__(self, *args, **kwargs): pass
    def __getattr__(self, name): return Anything()
    def __call__(self, *args, **kwargs): return args[0] if args and isinstance(args[0], type) else self
    def __hash__(self): return 1
    def __or__(self, other): return self
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return Anything()
def get_kernel(name, **options):
    import os
    os.makedirs({marker!r}, exist_ok=True)
    raise FileNotFoundError(name)
"""


def _edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def _with_config_code(folder: Path, marker: Path) -> None:
    payloads.module(folder / "theirs.py", marker, "from transformers import LlamaConfig as Theirs\n")
    _edit(folder / "config.json", auto_map={"AutoConfig": "theirs.Theirs"}, model_type="theirs")


def _with_model_code(folder: Path, marker: Path) -> None:
    payloads.module(folder / "theirs.py", marker, "from transformers import LlamaForCausalLM as Theirs\n")
    _edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "theirs.Theirs", "AutoProcessor": "theirs.Theirs"})


def _with_tokenizer_code(folder: Path, marker: Path) -> None:
    payloads.module(folder / "theirs.py", marker, "from transformers import PreTrainedTokenizerFast as Theirs\n")
    auto_map = {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}
    _edit(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Theirs")


def _with_generation_code(folder: Path, marker: Path) -> None:
    payloads.module(folder / "custom_generate" / "generate.py", marker, "def generate(model, **options): pass\n")
    (folder / "generation_config.json").write_text(json.dumps({"custom_generate": str(folder)}))


def _with_kernel(name: str) -> Callable[[Path, Path], None]:
    return lambda folder, marker: _edit(folder / "config.json", attn_implementation=name)


LOADED = "loaded"
NEEDS_CODE = r"it needs Python code that comes with it; read it, and set model\.trust_remote_code=true if you trust it"
FETCHED = r"its config\.json has attention computed by code from a hub \('.*'\); take attn_implementation out of it"
CASES: dict[str, tuple[str, Callable[[Path, Path], None], str]] = {
    "config": ("llama", _with_config_code, NEEDS_CODE),
    "model": ("llama", _with_model_code, LOADED),  # transformers has a class of its own
    "tokenizer": ("llama", _with_tokenizer_code, rf"{NEEDS_CODE}|{LOADED}"),
    "generation": ("llama", _with_generation_code, LOADED),
    "kernel": ("llama", _with_kernel("kernels-community/flash-attn3"), FETCHED),
    "strangers-kernel": ("llama", _with_kernel("paged|somebody/flash@main:run"), FETCHED),
    "mamba": ("mamba", lambda folder, marker: None, LOADED),  # whose layers look for kernels of the hub by themselves
}  # fmt: skip
# What runs where it is asked for, so that the marker can be relied on; transformers itself refuses somebody's kernels.
TRUSTED = ("config", "model", "tokenizer", "generation")
FETCHED_BY_5_12 = ("kernel", "mamba")


@pytest.mark.slow
def test_no_code_of_a_models_runs_unless_it_is_asked_for(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for name, (family, spoil, _) in CASES.items():
        for prefix in ("", "trusted-"):
            folder = tmp_path / "models" / (prefix + name)
            save_tiny(family, folder)
            spoil(folder, marker)
    _install_kernels(tmp_path / "site", marker)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path / 'site'}", "HF_HOME": str(tmp_path / "hub"),
                   "HF_HUB_OFFLINE": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.backends.hf.foreign_code_case", str(tmp_path)],
        capture_output=True, text=True, timeout=120, env=environment, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, (_, _, words) in CASES.items():
        said, has_run = found[name]
        with pytest.raises(ModelError, match=words):
            raise ModelError(said)
        assert not has_run, name
    expected = (*TRUSTED, *(FETCHED_BY_5_12 if hasattr(hub_kernels, "_kernels_available") else ()))
    assert {name for name in CASES if found[f"trusted-{name}"][1]} == set(expected)


def test_an_adapter_beside_the_model_is_refused(tmp_path: Path) -> None:
    """It would be put into what is scored, and PEFT before 0.21 imports the module that its configuration names."""
    save_tiny("llama", tmp_path / "model")
    tree = {"peft_type": "LORA", "target_modules": ["q_proj"], "megatron_config": {"a": 1}, "megatron_core": "theirs"}
    (tmp_path / "model" / "adapter_config.json").write_text(json.dumps(tree))
    with pytest.raises(ModelError, match=r"has an adapter_config\.json: transformers would add its adapter .* Merge"):
        load_hf_config(ModelConfig(name_or_path=str(tmp_path / "model")))


def _install_kernels(site: Path, marker: Path) -> None:
    """Write a package that calls itself `kernels`, whose only kernel makes the marker."""
    (site / "kernels-9.0.0.dist-info").mkdir(parents=True)
    (site / "kernels-9.0.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 9.0.0\n")
    (site / "kernels-9.0.0.dist-info" / "top_level.txt").write_text("kernels\n")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text(KERNELS.replace("{marker!r}", repr(str(marker))))
