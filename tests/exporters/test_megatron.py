"""Placement -> Megatron names, checked with Megatron-Bridge's own matcher on the paths of a Megatron model.

verl builds its adapters with Bridge's create_peft from the exported section, NeMo-RL builds Bridge's LoRA; both are
done here with Bridge itself. Megatron-SWIFT matches with PEFT, on the same paths.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from torch import nn

from plop_dist.backends.megatron.bridge import import_bridge
from plop_dist.errors import ExportError
from plop_dist.exporters.exporter import find_exporter
from plop_dist.exporters.suffixes import matcher
from plop_dist.values.placement import Placement
from tests.exporters.cases import llama_projections, place, projection, scores_of
from tests.installed import HAS_BRIDGE

if not HAS_BRIDGE:
    pytest.skip("Megatron-Bridge is not installed", allow_module_level=True)
import_bridge()
from megatron.bridge.peft.canonical_lora import CanonicalLoRA  # noqa: E402
from megatron.bridge.peft.lora import LoRA  # noqa: E402
from megatron.bridge.peft.utils import create_peft  # noqa: E402

megatron_bridge, megatron_swift = find_exporter("megatron-bridge"), find_exporter("megatron-swift")
nemo_rl, verl = find_exporter("nemo-rl"), find_exporter("verl")

PARTS = {
    "q_proj": ("self_attention.linear_qkv", "linear_q"),
    "k_proj": ("self_attention.linear_qkv", "linear_k"),
    "v_proj": ("self_attention.linear_qkv", "linear_v"),
    "o_proj": ("self_attention.linear_proj", "linear_proj"),
    "gate_proj": ("{mlp}.linear_fc1", "linear_fc1_gate"),
    "up_proj": ("{mlp}.linear_fc1", "linear_fc1_up"),
    "down_proj": ("{mlp}.linear_fc2", "linear_fc2"),
}
CHOICE = ["v_proj", "o_proj", "down_proj"]


def moe_projections():
    """Return a MoE's projections: layer 0 dense, layers 1 and 2 with two routed experts and a shared one."""
    found = []
    for item in llama_projections(3):
        where, _, name = item.fqn.rpartition(".")
        if item.layer == 0 or "self_attn" in item.fqn:
            found.append(item)
            continue
        for expert in ("shared_expert", "experts.0", "experts.1"):
            found.append(projection(f"{where}.{expert}.{name}", item.in_features, item.out_features))
    return found


def megatron_location(fqn: str, *, local_experts: bool) -> tuple[str, str]:
    """Return the path of the Megatron linear that holds a projection, and CanonicalLoRA's word for the part."""
    layer = fqn.split(".")[2]
    linear, part = PARTS[fqn.rpartition(".")[2]]
    expert = re.search(r"\.experts\.(\d+)\.", fqn)
    mlp = "mlp.shared_experts" if "shared_expert" in fqn else "mlp"
    if expert:
        mlp = f"mlp.experts.local_experts.{expert[1]}" if local_experts else "mlp.experts"
    return f"decoder.layers.{layer}.{linear.format(mlp=mlp)}", part


def adapted_by_bridge(peft: Any, placement: Placement, *, local_experts: bool = False) -> set[tuple[str, str]]:
    """Return (path, part) of everything that Bridge's matcher adapts among all projections of the model."""
    peft._init_target_match_state()
    found = set()
    for module in placement.source.modules:
        path, part = megatron_location(module.fqn, local_experts=local_experts)
        prefix, _, name = path.rpartition(".")
        match = peft.match(nn.Identity(), name, prefix)
        if match and (not isinstance(peft, CanonicalLoRA) or part in map(last, peft.canonical_mapping[match[0]])):
            found.add((path, part))
    return found


def last(target: str) -> str:
    return target.rpartition(".")[2].lstrip("*")


def chosen_locations(placement: Placement, *, local_experts: bool = False) -> set[tuple[str, str]]:
    return {megatron_location(fqn, local_experts=local_experts) for fqn in placement.modules}


def test_v_o_down_become_canonical_lora():
    placement = place(scores_of(llama_projections()), CHOICE, rank=16, alpha=32)
    export = megatron_bridge.export(placement)
    assert export.flags == (
        "CanonicalLoRA(target_modules=['linear_v', 'linear_proj', 'linear_fc2'], dim=16, alpha=32)",
    )
    namespace: dict[str, Any] = {}
    exec(export.files["peft.py"], namespace)
    peft = namespace["peft"]
    assert type(peft).__module__ == "plop_dist.canonical_lora"
    assert isinstance(peft, CanonicalLoRA)
    assert (peft.target_modules, peft.dim, peft.alpha) == (["linear_v", "linear_proj", "linear_fc2"], 16, 32)
    assert adapted_by_bridge(peft, placement) == chosen_locations(placement)
    from_yaml = create_peft(yaml.safe_load(export.files["peft.yaml"]))
    assert adapted_by_bridge(from_yaml, placement) == chosen_locations(placement)
    assert placement.to_megatron(dropout=0.1).dropout == 0.1
    like_peft = placement.to_megatron(r=16, lora_alpha=64, lora_dropout=0.2)
    assert (like_peft.dim, like_peft.alpha, like_peft.dropout) == (16, 64, 0.2)
    assert type(placement.to_megatron()) is type(peft)


@pytest.mark.parametrize(
    ("exporter", "engine"),
    [(megatron_bridge, "lora"), (megatron_bridge, "fused"), (nemo_rl, "megatron"), (megatron_swift, None)],
)
def test_fused_lora_is_refused_for_a_part_and_widened_on_demand(exporter, engine):
    placement = place(scores_of(llama_projections()), CHOICE)
    refusal = r"fused linears only.*linear_v\. Nearest choice: adapt linear_qkv whole .*\(--widen\).*CanonicalLoRA"
    with pytest.raises(ExportError, match=refusal):
        exporter.export(placement, engine=engine)
    export = exporter.export(placement, engine=engine, widen=True)
    assert export.widened == ("linear_qkv is adapted whole: linear_k, linear_q as well as linear_v.",)
    # rank 4 on linear_qkv (32 + 64), linear_proj (32 + 32) and linear_fc2 (48 + 32), in two layers
    assert "1,920 trainable parameters instead of the placement's 1,536." in export.notes
    assert "linear_qkv" in " ".join(export.flags)


@pytest.mark.parametrize(
    "types",
    [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"], ["o_proj", "down_proj"]],
)
def test_whole_fused_linears_are_fine_for_fused_lora(types):
    placement = place(scores_of(llama_projections()), types)
    peft = placement.to_megatron(engine="lora")
    assert isinstance(peft, LoRA)
    assert adapted_by_bridge(peft, placement) == chosen_locations(placement)
    assert isinstance(placement.to_megatron(), LoRA) == (types == ["o_proj", "down_proj"])


@pytest.mark.parametrize("local_experts", [False, True])
@pytest.mark.parametrize(
    "types",
    [
        ["down_proj"],
        ["experts.down_proj"],
        ["experts.gate_proj", "experts.up_proj"],
        ["up_proj", "v_proj"],
        ["down_proj", "experts.down_proj"],
        ["gate_proj", "up_proj", "experts.gate_proj", "experts.up_proj"],
    ],
)
def test_dense_shared_and_routed_experts_are_told_apart(types, local_experts):
    placement = place(scores_of(moe_projections()), types)
    export = megatron_bridge.export(placement)
    peft = create_peft(yaml.safe_load(export.files["peft.yaml"]))
    found = adapted_by_bridge(peft, placement, local_experts=local_experts)
    assert found == chosen_locations(placement, local_experts=local_experts)
    assert getattr(peft, "share_expert_adapters") is not any(name.startswith("experts.") for name in types)  # noqa: B009


def test_the_shared_expert_alone():
    placement = place(scores_of(moe_projections()), where=lambda item: "shared_expert" in item.fqn)
    assert adapted_by_bridge(placement.to_megatron(), placement) == chosen_locations(placement)


def test_single_layers_and_single_modules_and_their_limits():
    scores = scores_of(llama_projections(12))
    placement = place(scores, where=lambda item: item.layer == 1 or item.type == "v_proj")
    export = megatron_bridge.export(placement)
    assert adapted_by_bridge(placement.to_megatron(), placement) == chosen_locations(placement)
    assert "keep pipeline_model_parallel_size at 1" in " ".join(export.notes)
    staged = placement.with_source(scores.model_copy(update={"parallel": {"pp": 2}}))
    with pytest.raises(ExportError, match=r"parallel.pp \(2\)"):
        megatron_bridge.export(staged)
    with pytest.raises(ExportError, match="names that end a path"):
        megatron_swift.export(place(scores, ["o_proj"], where=lambda item: item.layer == 1))
    moe = scores_of(moe_projections())
    with pytest.raises(ExportError, match="Megatron names them alike"):
        megatron_bridge.export(place(moe, where=lambda item: ".experts.1.down" in item.fqn))


def test_names_that_megatron_does_not_have_and_an_mlp_without_gate():
    other = [projection("model.layers.0.mixer.in_proj", 8, 8), projection("model.layers.0.self_attn.q_proj", 8, 8)]
    with pytest.raises(ExportError, match=r"no name for model.layers.0.mixer.in_proj.*placement.exclude=\[in_proj\]"):
        megatron_bridge.export(place(scores_of(other)))
    ungated = scores_of([item for item in llama_projections() if item.type != "gate_proj"])
    assert megatron_bridge.export(place(ungated, ["up_proj"])).flags == (
        "LoRA(target_modules=['linear_fc1'], dim=4, alpha=8)",
    )
    with pytest.raises(ExportError, match="an MLP without a gate"):
        megatron_bridge.export(place(ungated, ["up_proj", "v_proj"]))
    latent = [projection(f"model.layers.0.self_attn.{name}", 8, 8) for name in ("q_proj", "kv_b_proj", "o_proj")]
    export = megatron_bridge.export(place(scores_of(latent), ["q_proj", "kv_b_proj"]))
    assert "['linear_q_proj', 'linear_kv_up_proj']" in export.flags[0]


def overrides(flags: tuple[str, ...]) -> Any:
    """Return the tree that overrides make, as OmegaConf's dot list reads them."""
    words = [word.lstrip("+") for flag in flags for word in shlex.split(flag)]
    return OmegaConf.to_container(OmegaConf.from_dotlist(words))


@pytest.mark.parametrize("types", [CHOICE, ["o_proj", "down_proj"], ["q_proj", "up_proj"]])
def test_verl_builds_its_adapters_from_the_overrides(types):
    placement = place(scores_of(llama_projections()), types)
    export = verl.export(placement, engine="megatron")
    model = overrides(export.flags)["actor_rollout_ref"]["model"]
    assert yaml.safe_load(export.files["verl_megatron.yaml"])["actor_rollout_ref"]["model"] == model
    peft = create_peft(model["lora"])
    assert adapted_by_bridge(peft, placement) == chosen_locations(placement)
    assert (peft.dim, peft.alpha) == (4, 8)
    needs_fix = types != ["o_proj", "down_proj"]
    assert model.get("external_lib") == ("plop_dist.canonical_lora" if needs_fix else None)


def test_nemo_rl_and_megatron_swift_on_whole_fused_linears():
    placement = place(scores_of(moe_projections()), ["q_proj", "k_proj", "v_proj", "down_proj"])
    section = overrides(nemo_rl.export(placement, engine="megatron").flags)["policy"]["megatron_cfg"]["peft"]
    assert section.pop("enabled") is True
    assert adapted_by_bridge(LoRA(**section), placement) == chosen_locations(placement)
    flags = megatron_swift.export(placement).flags
    names = shlex.split(next(flag for flag in flags if flag.startswith("--target_modules")))[1:]
    matches = matcher(names)
    every = {megatron_location(module.fqn, local_experts=False) for module in placement.source.modules}
    assert {item for item in every if matches(item[0])} == chosen_locations(placement)
