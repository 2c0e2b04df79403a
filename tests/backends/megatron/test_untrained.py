"""What Megatron scores rightly and would train wrongly, or crash on, is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plop_dist.backends.megatron import backend, families
from plop_dist.backends.megatron.record import RECORD
from plop_dist.config.loading import parse_config
from plop_dist.errors import MissingExtraError, ModelError
from tests.installed import needs_bridge
from tests.models import tiny_config

pytestmark = needs_bridge  # whose version the refusals name

SFT: dict[str, Any] = {"method": "sft"}
GRPO: dict[str, Any] = {"method": "grpo", "rewards": ["builtin:number"]}


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
@pytest.mark.parametrize("train", [SFT, GRPO], ids=["sft", "grpo"])
def test_training_is_refused_and_scoring_is_not(
    tmp_path: Path, family: str, parallel: dict[str, Any], message: str | None, train: dict[str, Any]
) -> None:
    hf_config: Any = tiny_config(family)
    hf_config.architectures = [{"deepseek_v3": "DeepseekV3", "qwen3_moe": "Qwen3Moe", "llama": "Llama"}[family]]
    hf_config.architectures[0] += "ForCausalLM"
    tree = {"model": {"name_or_path": str(tmp_path)}, "data": {"path": "builtin:arithmetic"}}
    parallel = {"backend": "megatron", **parallel}
    elsewhere = {**GRPO, "engine": "verl"}
    for scored in ({"method": "none"}, elsewhere):
        families.check_family(hf_config, parse_config({**tree, "parallel": parallel, "train": scored}))
    config = parse_config({**tree, "parallel": parallel, "train": train})
    if message is None:
        families.check_family(hf_config, config)
        return
    start = rf"train\.method is '{train['method']}', and .* set train\.method=none"
    with pytest.raises(ModelError, match=start) as caught:
        families.check_family(hf_config, config)
    caught.match(message)


@pytest.mark.parametrize(
    ("family", "name", "has_te"), [("llama", "LlamaForCausalLM", True), ("mistral", "MistralForCausalLM", False)]
)
def test_packed_rows_whose_samples_are_not_kept_apart_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, name: str, has_te: bool
) -> None:
    monkeypatch.setattr(families, "has_transformer_engine", lambda: has_te)
    hf_config: Any = tiny_config(family)
    hf_config.architectures = [name]
    tree = {"model": {"name_or_path": str(tmp_path)}, "data": {"path": "builtin:arithmetic"},
            "parallel": {"backend": "megatron"}}  # fmt: skip
    families.check_family(hf_config, parse_config({**tree, "train": SFT}))
    with pytest.raises(ModelError, match=r"apart in a packed row here: set train\.packing=false"):
        families.check_family(hf_config, parse_config({**tree, "train": {**SFT, "packing": True}}))
    if not has_te:
        hf_config.sliding_window = None
        families.check_family(hf_config, parse_config({**tree, "train": {**SFT, "packing": True}}))


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        (
            "qwen3_next",
            "Qwen3NextForCausalLM",
            "layers with 'linear_num_key_heads' 4, for which .* needs fla, which is",
        ),
        ("nemotron_h", "NemotronHForCausalLM", "'mamba_num_heads' 128, for which .* pip install mamba-ssm, or use"),
    ],
)
def test_check_names_a_package_of_kernels_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, name: str, message: str
) -> None:
    monkeypatch.setattr(families, "has_transformer_engine", lambda: True)
    hf_config: Any = tiny_config(family)
    hf_config.architectures = [name]
    tree = {"model": {"name_or_path": str(tmp_path)}, "data": {"path": "builtin:arithmetic"},
            "parallel": {"backend": "megatron"}}  # fmt: skip
    with pytest.raises(MissingExtraError, match=message):
        RECORD.check_model(hf_config, parse_config(tree))


def test_check_refuses_a_family_that_the_layers_here_do_not_build(tmp_path: Path) -> None:
    hf_config: Any = tiny_config("mixtral")
    hf_config.architectures = ["MixtralForCausalLM"]
    tree = {"model": {"name_or_path": str(tmp_path)}, "data": {"path": "builtin:arithmetic"},
            "parallel": {"backend": "megatron"}}  # fmt: skip
    with pytest.raises(ModelError, match="is a MixtralForCausalLM"):
        RECORD.check_model(hf_config, parse_config(tree))


def test_a_package_that_bridge_imports_while_it_builds_is_named(tmp_path: Path) -> None:
    tree = {"model": {"name_or_path": str(tmp_path)}, "data": {"path": "builtin:arithmetic"}}
    with (
        pytest.raises(MissingExtraError, match=r"without a package \(causal_conv1d is required\); install it, or use"),
        backend._explained(tiny_config("llama"), parse_config(tree)),
    ):
        raise ImportError("causal_conv1d is required.\nwhen instantiating a layer")
