"""Architectures of transformers by tiny configurations: exact against a reference without hooks, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sweep.family import sweep_family
from tests.sweep.table import architectures, markdown, sweep, table_file

# One of each kind: dense, experts in three ways of storing and one unknown, latent attention, state-space and linear
# attention, learned positions, an encoder, a model of images, weights that no linear holds.
SAMPLE = ("llama", "mixtral", "granitemoe", "llama4_text", "aria_text", "deepseek_v3", "mamba", "qwen3_next", "gpt2",
          "bert", "gemma3", "xlnet", "apertus")  # fmt: skip


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_is_exact(model_type: str, tmp_path: Path) -> None:
    row = sweep_family(model_type, architectures()[model_type], tmp_path)
    verdicts = {way: outcome.verdict for way, outcome in row.ways.items()}
    assert verdicts == {"command": "exact", "host": "exact"}, row.ways


@pytest.mark.rare
def test_every_architecture_is_exact_or_refused() -> None:
    """Takes three minutes, and writes the table anew."""
    rows = sweep()
    table_file("transformers").write_text(markdown(rows))
    odd = {(row.model_type, way): one.said for row in rows for way, one in row.ways.items()
           if one.verdict in ("wrong", "crashed")}  # fmt: skip
    assert not odd
    assert len([row for row in rows if "" not in row.ways]) > 235
