"""Published models with other layers than the tiny one of their family: exact on two ranks with the GPU's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.backends.megatron.models import fresh
from tests.installed import needs_bridge
from tests.spawn import run_ranks
from tests.sweep.family import Outcome, build, by_command, save, score_saved
from tests.te_on_cpu.install import needs_te, specified

pytestmark = [pytest.mark.slow, needs_bridge, needs_te]

KEYS_ARE_VALUES = {"attention_k_eq_v": True, "num_global_key_value_heads": 2, "num_key_value_heads": 4,
                   "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}  # fmt: skip
EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
SP = {"tp": 2, "sequence_parallel": True}
VARIANTS: dict[str, tuple[str, str, dict[str, Any], list[dict[str, Any]]]] = {
    "Gemma 4 31B": ("gemma4_text", "Gemma4ForCausalLM", KEYS_ARE_VALUES, [SP]),
    "Gemma 4 26B-A4B": ("gemma4_text", "Gemma4ForCausalLM", {**KEYS_ARE_VALUES, **EXPERTS}, [{**SP, "ep": 2}]),
    "Falcon-H1 with norms": ("falcon_h1", "FalconH1ForCausalLM", {"mamba_rms_norm": True}, [SP, {"pp": 2}]),
}


def _outcomes(rank: int, root: Path) -> dict[str, Outcome]:
    found = {}
    for name, (model_type, class_name, fields, layouts) in VARIANTS.items():
        model = build(model_type, class_name, **fields)
        for layout in layouts:
            case = f"{name} {layout}"
            if rank == 0:
                found[case] = by_command(model, root / name, "megatron", **layout)
            else:
                score_saved(root / name, "megatron", **layout)
            fresh()
    return found


def test_they_are_exact(tmp_path: Path) -> None:
    for name, (model_type, class_name, fields, _) in VARIANTS.items():
        (tmp_path / name).mkdir()
        save(build(model_type, class_name, **fields), tmp_path / name)
    found, _ = run_ranks(2, specified, "transformer_engine", _outcomes, tmp_path)
    assert len(found) == 4
    assert {case: outcome for case, outcome in found.items() if outcome.verdict != "exact"} == {}
