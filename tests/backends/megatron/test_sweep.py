"""Megatron-Bridge's families by tiny configurations: exact with each specification against transformers, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.installed import needs_bridge
from tests.models import tiny_tokenizer
from tests.spawn import run_ranks
from tests.sweep.family import build
from tests.sweep.table import markdown, sweep, table_file
from tests.te_on_cpu.install import needs_te

pytestmark = needs_bridge


@needs_te
@pytest.mark.rare
def test_every_family_is_exact_or_refused() -> None:
    """Takes some ten minutes, and writes the table anew."""
    rows = sweep(backend="megatron")
    table_file("megatron").write_text(markdown(rows, "megatron"))
    odd = {(row.class_name, way): one.said for row in rows for way, one in row.ways.items()
           if one.verdict not in ("exact", "refused")}  # fmt: skip
    assert not odd


def _names(rank: int, directory: Path) -> tuple[bool, bool, float]:
    from plop_dist.backends.hf.load import meta_model
    from plop_dist.backends.megatron.bridge import import_auto_bridge
    from plop_dist.backends.megatron.stored_names import offer_known_names
    from plop_dist.config.schema import ModelConfig

    bridge: Any = import_auto_bridge().from_hf_pretrained(str(directory))
    state, asked = bridge.hf_pretrained.state, "backbone.embeddings.weight"
    before = asked in state
    offer_known_names(bridge, meta_model(ModelConfig(name_or_path=str(directory))))
    return before, asked in state, float(state[asked].norm())


@pytest.mark.slow
def test_weights_that_transformers_has_saved_under_other_names_are_found(tmp_path: Path) -> None:
    model = build("nemotron_h", "NemotronHForCausalLM")
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ((before, after, norm),) = run_ranks(1, _names, tmp_path)
    assert (before, after) == (False, True)
    assert norm == pytest.approx(float(model.get_input_embeddings().weight.norm()), rel=1e-6)
