"""What Megatron scores rightly and would train wrongly, or crash on, is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plop_dist.backends.megatron import families
from plop_dist.config.loading import parse_config
from plop_dist.errors import ModelError
from tests.installed import needs_bridge
from tests.models import tiny_config

pytestmark = needs_bridge  # whose version the refusals name

SFT = {"method": "sft"}


@pytest.mark.parametrize(
    ("family", "parallel", "message"),
    [
        ("deepseek_v3", {"tp": 2}, "routed experts .* parallel.sequence_parallel=true alone"),
        ("deepseek_v3", {"tp": 2, "sequence_parallel": True}, None),
        ("qwen3_moe", {"tp": 2}, "routed experts .* parallel.sequence_parallel=true alone"),
        ("qwen3_moe", {"tp": 2, "sequence_parallel": True}, None),
        ("qwen3_moe", {"dp": 2}, None),
        ("llama", {"tp": 2}, None),
        ("llama", {"tp": 2, "sequence_parallel": True}, None),
    ],
)
def test_training_is_refused_and_scoring_is_not(
    tmp_path: Path, family: str, parallel: dict[str, Any], message: str | None
) -> None:
    hf_config: Any = tiny_config(family)
    hf_config.architectures = [{"deepseek_v3": "DeepseekV3", "qwen3_moe": "Qwen3Moe", "llama": "Llama"}[family]]
    hf_config.architectures[0] += "ForCausalLM"
    tree = {"model": {"name_or_path": str(tmp_path)}, "data": {"path": "builtin:arithmetic"}}
    parallel = {"backend": "megatron", **parallel}
    families.check_family(hf_config, parse_config({**tree, "parallel": parallel}))
    config = parse_config({**tree, "parallel": parallel, "train": SFT})
    if message is None:
        families.check_family(hf_config, config)
        return
    with pytest.raises(ModelError, match=r"train\.method is 'sft', and .* set train\.method=none") as caught:
        families.check_family(hf_config, config)
    caught.match(message)
