"""Every place where somebody else's file is turned into objects is known, and guarded in the way that stands here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.structure.test_imports import ROOT

# call -> where it may stand -> how it is guarded. The last name of a call is compared: np.load, torch.load, load alone.
HOMES: dict[str, dict[str, str]] = {
    "torch.load": {
        "checkpoints/safe_pickle.py": "weights_only=True, and classes that are looked up by name become stand-ins",
        "training/checkpoint.py": "weights_only=True, after check_resumable",
    },
    "pickle.Unpickler": {"checkpoints/torch_dist_index.py": "a list of (module, name) pairs"},
    "dist_checkpointing.load": {"backends/megatron/checkpoint.py": "after check_index, tensors alone, in tensors_only"},
    "load_checkpoint": {
        "backends/megatron/backend.py": "our own, which calls dist_checkpointing.load"
    },  # not DeepSpeed's
    "train": {"training/trl/checkpoints.py": "resume_from_checkpoint after check_resumable, in tensors_only"},
    "load_dataset": {"data/rows.py": "datasets runs no scripts and unpickles nothing since its version 4"},
    "safe_open": {"values/files.py": "safetensors", "training/trl/checkpoints.py": "safetensors"},
    "load_file": {
        "training/engines/megatron.py": "safetensors, of this run's own",
        "training/external/bring_back.py": "safetensors, of the job that this run has started",
    },
    "from_pretrained": {
        "backends/hf/load.py": "trust_remote_code as configured, after check_foreign_code",
        "backends/hf/quantized/loadable.py": "no file: weights of its own",
        "backends/hf/stored_weights.py": "no file: a state dict without values",
        "backends/hf/padding.py": "no file: a state dict of random values",
        "checkpoints/builtin.py": "the GGUF of an installed package",
    },
    "from_hf_pretrained": {"backends/megatron/backend.py": "trust_remote_code as configured, after load_hf_config"},
    "import_module": {
        "__init__.py": "this package's own modules",
        "registry.py": "this package's own addresses, and entry points of installed packages",
        "launch/pipeline.py": "this package's own modules",
        "backends/deepspeed/record.py": "this package's own modules",
        "backends/megatron/bridge.py": "megatron's own modules",
        "backends/megatron/transformer_engine.py": "of the stub that stands for the package",
        "training/rewards.py": "the user's own rewards, when training begins",
    },
    "yaml.safe_load": {
        "config/loading.py": "values of overrides",
        "exporters/read_back.py": "files of other frameworks that diff compares",
    },
    "yaml.compose": {
        "config/loading.py": "SafeLoader, and only looked at",
        "config/origin.py": "SafeLoader, for the lines of keys",
    },
    "OmegaConf.create": {"*": "OmegaConf's YAML is a SafeLoader's"},
}
# Never called: each of them runs what a file says.
NEVER = {
    "pickle.load", "pickle.loads", "np.load", "numpy.load", "read_pickle", "load_from_disk",
    "unsafe_load", "full_load", "yaml.load", "yaml.load_all", "marshal.loads", "joblib.load", "shelve.open",
    "jit.load", "hub.load", "exec_module", "run_path", "run_module", "__import__", "eval", "exec", "get_kernel",
}  # fmt: skip
BUILTINS = {"eval", "exec", "__import__"}  # a module's own eval() is something else


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Yield the calls of a file by the whole name that is written there."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node
        elif isinstance(node, ast.ClassDef):
            yield from ((ast.unparse(base), ast.Call(base, [], [])) for base in node.bases)


def is_called(written: str, name: str) -> bool:
    """Tell whether what is written calls `name`: all of its parts, or its last one imported by itself."""
    if name in BUILTINS:
        return written == name
    return written == name or written.endswith(f".{name}")


def found(names: Iterator[str] | set[str] | dict[str, dict[str, str]]) -> list[tuple[str, str, ast.Call]]:
    return [
        (name, path.relative_to(ROOT).as_posix(), call)
        for path in sorted(ROOT.rglob("*.py"))
        for written, call in calls(path)
        for name in names
        if is_called(written, name)
    ]


def test_whatever_turns_files_into_objects_is_known() -> None:
    seen = found(HOMES)
    astray = {
        f"{home}: {name}" for name, home, call in seen
        if not {home, "*"} & HOMES[name].keys() and not (name == "train" and not _resumes(call))
    }  # fmt: skip
    assert astray == set()
    unused = {(name, home) for name in HOMES for home in HOMES[name]} - {(name, home) for name, home, _ in seen}
    assert {home for _, home in unused} <= {"*"}, "what is no longer called is no longer to be allowed"


def test_nothing_is_called_that_runs_what_a_file_says() -> None:
    assert [(name, home) for name, home, _ in found(NEVER)] == []


def test_torch_loads_tensors_alone() -> None:
    for _, home, call in found({"torch.load"}):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("weights_only") == "True", home


def test_transformers_is_told_whether_code_is_trusted() -> None:
    """Every Auto class would else ask on the terminal."""
    for name, home, call in found({"from_pretrained", "from_config"}):
        written = ast.unparse(call)
        is_auto = written.startswith(("AutoModel", "AutoConfig", "AutoTokenizer", "cast(Any, Auto"))
        if is_auto and home.startswith("backends/"):
            assert "trust_remote_code" in written or "**options" in written, f"{home}: {name}"


@pytest.mark.parametrize("written", ["pickle.load", "torch.jit.load", "eval", "yaml.unsafe_load"])
def test_the_list_is_read_as_meant(written: str) -> None:
    assert any(is_called(written, name) for name in NEVER)
    assert not any(is_called("self._model.eval", name) for name in NEVER)


def _resumes(call: ast.Call) -> bool:
    return any(keyword.arg == "resume_from_checkpoint" for keyword in call.keywords)
