"""A router that transformers multiplies with and does not call has no score in Megatron either, as in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from plop_dist.backends.megatron.uncalled import uncalled_routers
from tests.backends.megatron.models import config, gains, samples, true_gains, worst
from tests.backends.megatron.test_checkpoint import LATENT
from tests.installed import needs_bridge
from tests.models import save_tiny
from tests.spawn import run_ranks
from tests.sweep.tiny_configs import tiny_config

ROUTED = {
    "deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM", "glm4_moe": "Glm4MoeForCausalLM", "gpt_oss": "GptOssForCausalLM",
    "hy_v3": "HYV3ForCausalLM", "minimax_m2": "MiniMaxM2ForCausalLM", "gemma4_text": "Gemma4ForCausalLM",
}  # fmt: skip


@pytest.mark.parametrize("model_type", ROUTED)
def test_they_are_found_by_running_what_is_around_them(model_type: str) -> None:
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, ROUTED[model_type])(tiny_config(model_type))
    paths = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    expected = {path for path in paths if path.endswith("mlp.gate")} if model_type == "deepseek_v2" else set()
    assert uncalled_routers(model, paths) == expected
    assert bool(expected) == (model_type == "deepseek_v2")


def _score(rank: int, folder: Path) -> dict[str, Any]:
    from plop_dist.backends.megatron.backend import load

    return gains(load(config(folder, tp=2, sequence_parallel=True)), samples())


@pytest.mark.slow
@needs_bridge
def test_such_a_router_has_no_score_and_its_experts_have(tmp_path: Path) -> None:
    save_tiny("deepseek_v2", tmp_path, **LATENT)
    truth = true_gains(tmp_path, samples())  # by hooks of linears
    assert "model.layers.1.mlp.experts.0.down_proj" in truth
    assert "model.layers.1.mlp.gate" not in truth
    for found in run_ranks(2, _score, tmp_path):
        assert found["model.layers.1.mlp.gate"] == (0.0, 0)
        error, where = worst(found, truth)
        assert error < 1e-5, where
