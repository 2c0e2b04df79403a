"""cfg.peft of a Megatron-Bridge recipe: called as Bridge's setup calls it, between loading and wrapping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import plop_dist
from plop_dist.errors import ConfigError
from tests.installed import needs_bridge
from tests.models import random_tokens, save_tiny
from tests.plugin.hosts import load
from tests.spawn import run_ranks


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": random_tokens(2, 9, seed=99)}]


def _job(rank: int, directory: Path, folder: Path) -> Any:
    from plop_dist.backends.megatron.backend import load_chunks
    from tests.backends.megatron.models import config

    chunks, _ = load_chunks(config(directory, tp=2))
    peft = plop_dist.MegatronBridgePeft(batches=batches, k=3, lora={"r": 4, "lora_alpha": 8})
    with pytest.raises(ConfigError, match="adapts a whole model at once, not 'linear_qkv' by itself"):
        peft.transform(chunks[0], "linear_qkv")
    assert peft.to_cfg_dict()["_target_"] == "plop_dist.plugin.bridge_peft.MegatronBridgePeft"
    adapted = peft(chunks, training=True)
    peft.set_params_to_save(adapted)
    trained = {name for name, parameter in adapted[0].named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".adapter." in name for name in trained)
    assert trained == peft.params_to_save
    assert adapted[0].training
    plop_dist.save_adapter(adapted, folder)
    assert peft.placement is not None
    return peft.placement.modules, peft.to_cfg_dict()


@needs_bridge
@pytest.mark.slow
def test_bridge_gets_what_the_model_in_one_process_would(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    (modules, written), (others, _) = run_ranks(2, _job, tmp_path / "model", tmp_path / "adapter")
    expected = plop_dist.place(plop_dist.score(load(tmp_path / "model"), batches()), k=3)
    assert modules == others == expected.modules
    assert written["_target_"] == "plop_dist.canonical_lora.CanonicalLoRA"
    assert (written["dim"], written["alpha"]) == (4, 8)
    from peft import PeftModel

    held: Any = PeftModel.from_pretrained(load(tmp_path / "model"), str(tmp_path / "adapter"))
    assert {path for path, module in held.named_modules() if hasattr(module, "lora_A")} == {
        f"base_model.model.{fqn}" for fqn in modules
    }
