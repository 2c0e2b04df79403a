"""Vision-language models in Megatron: their language model is scored as transformers scores it, and not trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from plop_dist.errors import ModelError
from tests.backends.megatron.models import config, fresh, gains, samples, true_gains, worst
from tests.installed import needs_bridge
from tests.spawn import run_ranks
from tests.te_on_cpu.install import needs_te, specified
from tests.vlms import VLMS, save_tiny_vlm

pytestmark = [pytest.mark.slow, needs_bridge, needs_te]
TOLERANCE = 3e-5  # float32 against float64: Gemma 3's head is at 1.1e-5
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("gemma3", {"tp": 2}),
    ("gemma3", {"pp": 2}),
    ("qwen2_5_vl", {"tp": 2, "sequence_parallel": True}),
    ("qwen3_vl", {"tp": 2}),
]


def _score(rank: int, root: Path) -> tuple[list[dict[str, Any]], str]:
    from plop_dist.backends.megatron.backend import load

    found = []
    for family, layout in LAYOUTS:
        found.append(gains(load(config(root / family, **layout)), samples()))
        fresh()
    trained = config(root / "gemma3", tp=2)
    trained = trained.model_copy(update={"train": trained.train.model_copy(update={"method": "sft"})})
    with pytest.raises(ModelError) as caught:
        load(trained)
    return found, str(caught.value)


def test_their_language_model_is_scored_like_transformers(tmp_path: Path) -> None:
    families = dict.fromkeys(family for family, _ in LAYOUTS)
    for family in families:
        save_tiny_vlm(family, tmp_path / family, tied=family == "gemma3")  # as Bridge takes every Gemma to be
    truth = {
        family: true_gains(tmp_path / family, samples(), model_class=getattr(transformers, VLMS[family][0]))
        for family in families
    }
    for report, message in run_ranks(2, specified, "transformer_engine", _score, tmp_path):
        for (family, layout), found in zip(LAYOUTS, report, strict=True):
            error, where = worst(found, truth[family])
            assert error < TOLERANCE, f"{family} {layout}: {where}"
        assert message.startswith("train.method is 'sft', and model.name_or_path")
        assert "its language model is scored, and not trained" in message
