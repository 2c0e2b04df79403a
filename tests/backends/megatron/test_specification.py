"""Which layers Megatron builds: Transformer Engine's where it can be imported, its own where not; CUDA has no say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plop_dist.errors import ModelError
from tests.backends.megatron.models import config
from tests.installed import needs_bridge
from tests.models import save_tiny
from tests.spawn import run_ranks
from tests.te_on_cpu.install import SITE, needs_te, specified

pytestmark = [pytest.mark.slow, needs_bridge]
LINEARS = {
    "local": {"ColumnParallelLinear", "RowParallelLinear"},
    "transformer_engine": {"ColumnParallelLinear", "TELayerNormColumnParallelLinear", "TERowParallelLinear"},
}


def _classes(rank: int, directory: Path) -> tuple[set[str], list[str]]:
    import logging

    from plop_dist.backends.megatron.backend import load_chunks

    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("plop_dist").addHandler(handler)
    logging.getLogger("plop_dist").setLevel(logging.INFO)
    (chunk,), _ = load_chunks(config(directory))
    return {type(m).__name__ for m in chunk.modules() if type(m).__name__.endswith("Linear")}, lines


def _with_a_class_of_our_own(rank: int, directory: Path) -> tuple[set[str], list[str], str]:
    return *_classes(rank, directory), _refused(directory)


@needs_te
def test_transformer_engines_layers_are_built_without_cuda_and_no_others_are_scored(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    ((found, lines, message),) = run_ranks(1, specified, "transformer_engine", _with_a_class_of_our_own, tmp_path)
    assert found == LINEARS["transformer_engine"]
    off = next(line for line in lines if "switched off in Megatron" in line)
    assert off.startswith("No CUDA: ")
    assert "bias_dropout_fusion" in off
    assert message.startswith("'decoder.layers.1.mlp.linear_fc2' is a tests.backends.megatron.test_specification.")
    assert "computes more than its TERowParallelLinear" in message


def _without_library(rank: int, directory: Path) -> tuple[set[str], list[str]]:
    sys.path.insert(0, str(SITE))
    return _classes(rank, directory)


@needs_te
def test_a_package_without_its_library_counts_as_absent_and_is_named(tmp_path: Path) -> None:
    """Megatron itself does not get past the FileNotFoundError that importing it raises."""
    save_tiny("llama", tmp_path)
    ((found, lines),) = run_ranks(1, _without_library, tmp_path)
    assert found == LINEARS["local"]
    assert any(line.startswith("No Transformer Engine: switched off in Megatron: ") for line in lines)
    (hidden,) = [line for line in lines if "cannot be imported" in line]
    assert hidden.startswith("Transformer Engine is installed but cannot be imported (RuntimeError: Found empty")


@needs_te
@pytest.mark.rare
def test_a_command_of_ours_scores_with_transformer_engine(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    tree = {"run_dir": str(tmp_path / "run"), "model": {"name_or_path": str(tmp_path / "model")},
            "data": {"path": "builtin:arithmetic", "num_samples": 4, "max_length": 8}}  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    command = [
        sys.executable, "-m", "tests.te_on_cpu.install", "score", str(tmp_path / "config.yaml"),
        "parallel.backend=megatron",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "scores.json").is_file()
    assert "stub" not in done.stdout + done.stderr


def _refused(directory: Path) -> str:
    from megatron.core.extensions import transformer_engine

    from plop_dist.backends.megatron.backend import load, wrap

    class ScaledLinear(transformer_engine.TERowParallelLinear):
        def forward(self, x: Any) -> Any:
            y, bias = super().forward(x)
            return 2 * y, bias

    model: Any = load(config(directory))
    chunk = model._bare[0]
    chunk.decoder.layers[1].mlp.linear_fc2.__class__ = ScaledLinear
    with pytest.raises(ModelError) as caught:
        wrap([chunk])
    return str(caught.value)
