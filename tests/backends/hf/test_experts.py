"""Routed experts kept as 3-D parameters: every expert's gains against float64 brute force, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from plop_dist.backends.deepspeed.zero import gathered
from plop_dist.backends.hf.experts import StackedExpertSite, find_expert_sites
from plop_dist.backends.hf.registered_experts import IMPLEMENTATION
from plop_dist.errors import LayoutError, ModelError
from tests.models import random_tokens, tiny, tiny_config
from tests.spawn import run_ranks

NEMOTRON = {
    "hidden_size": 32, "layers_block_type": ["moe", "attention"], "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "mamba_num_heads": 4,
    "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1,
}  # fmt: skip
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {}), ("mixtral", {}), ("qwen3_next", {}), ("gpt_oss", {}), ("nemotron_h", NEMOTRON),
]  # fmt: skip
IDS = [family for family, _ in FAMILIES]


class Notes:
    """A recorder that keeps every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[StackedExpertSite, Tensor, list[Tensor], Tensor]] = []

    def record(self, site: Any, in_sq_T: Tensor, out_sq_T: list[Tensor], *, token_index_T: Tensor) -> None:
        self.calls.append((site, in_sq_T, list(out_sq_T), token_index_T))

    def gains(self) -> dict[str, dict[int, float]]:
        """Return {fqn: {token: gain}}, asserting that no token is counted twice."""
        gains: dict[str, dict[int, float]] = {}
        for site, in_sq_T, out_sq, tokens_T in self.calls:
            for projection, out_sq_T in zip(site.projections, out_sq, strict=True):
                assert in_sq_T.shape == out_sq_T.shape == tokens_T.shape
                own = gains.setdefault(projection.fqn, {})
                for token, gain in zip(tokens_T.tolist(), (out_sq_T / in_sq_T).sqrt().tolist(), strict=True):
                    assert token not in own, f"{projection.fqn} counts token {token} twice"
                    own[token] = gain
        return gains


@contextmanager
def attached(sites: list[StackedExpertSite], notes: Any) -> Iterator[None]:
    removers = [site.attach(notes) for site in sites]
    try:
        yield
    finally:
        for remove in removers:
            remove()


@contextmanager
def expert_inputs(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Give {path: (hidden states, chosen experts)} of every experts module's last call."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _module, args, path=path: seen.update({path: (args[0].clone(), args[1].clone())})
        )
        for path, module in model.named_modules()
        if path.endswith(".experts")
    ]
    yield seen
    for handle in handles:
        handle.remove()


def brute_force(model: nn.Module, seen: dict[str, tuple[Tensor, Tensor]]) -> dict[str, dict[int, float]]:
    """Return {fqn: {token: gain}} in float64, token by token, from the parameters and the layout of each family."""
    gains: dict[str, dict[int, float]] = {}
    for path, (hidden, chosen) in seen.items():
        experts: Any = model.get_submodule(path).double()
        for token, picks in enumerate(chosen.tolist()):
            z = hidden[token].double()
            for expert in set(picks):
                parts = weights_of(experts, expert)
                down = parts.pop("down_proj")
                y = {name: weight @ z for name, weight in parts.items()}
                biased = dict(y)
                if experts.has_bias:
                    bias = experts.gate_up_proj_bias[expert]
                    biased = {"gate_proj": y["gate_proj"] + bias[::2], "up_proj": y["up_proj"] + bias[1::2]}
                inner = activation(experts, biased)
                for name, out in [*y.items(), ("down_proj", down @ inner)]:
                    source = inner if name == "down_proj" else z
                    gains.setdefault(f"{path}.{expert}.{name}", {})[token] = float(out.norm() / source.norm())
        experts.float()
    return gains


def weights_of(experts: Any, expert: int) -> dict[str, Tensor]:
    """Return this expert's weights by logical name, each (O, I)."""
    first = experts.gate_up_proj[expert] if experts.has_gate else experts.up_proj[expert]
    down = experts.down_proj[expert]
    if type(experts).__name__ == "GptOssExperts":  # transposed, gate and up in turn
        return {"gate_proj": first.T[::2], "up_proj": first.T[1::2], "down_proj": down.T}
    if not experts.has_gate:
        return {"up_proj": first, "down_proj": down}
    half = first.shape[0] // 2
    return {"gate_proj": first[:half], "up_proj": first[half:], "down_proj": down}


def activation(experts: Any, y: dict[str, Tensor]) -> Tensor:
    if type(experts).__name__ == "GptOssExperts":
        gate, up = y["gate_proj"].clamp(max=7.0), y["up_proj"].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return experts.act_fn(y["gate_proj"]) * y["up_proj"] if experts.has_gate else experts.act_fn(y["up_proj"])


def implementations(model: PreTrainedModel) -> set[str]:
    return {module.config._experts_implementation for module in model.modules() if hasattr(module, "is_concatenated")}


@pytest.mark.parametrize(("family", "overrides"), FAMILIES, ids=IDS)
@torch.no_grad()
def test_gains_of_every_expert_equal_brute_force(family: str, overrides: dict[str, Any]) -> None:
    model = tiny(family, **overrides)
    tokens = random_tokens(2, 9)
    before, own = model(tokens).logits, implementations(model)
    assert IMPLEMENTATION not in own
    model.set_experts_implementation("eager")
    eager = model(tokens).logits
    model.set_experts_implementation(own.pop())
    own = implementations(model)

    sites, notes = find_expert_sites(model), Notes()
    with expert_inputs(model) as seen, attached(sites, notes):
        assert implementations(model) == {IMPLEMENTATION}
        during = model(tokens).logits
    assert torch.equal(during, eager)
    assert implementations(model) == own
    assert torch.equal(model(tokens).logits, before)

    gains, expected = notes.gains(), brute_force(model, seen)
    assert {fqn: set(of) for fqn, of in gains.items()} == {fqn: set(of) for fqn, of in expected.items()}
    for fqn, of in gains.items():
        for token, gain in of.items():
            assert gain == pytest.approx(expected[fqn][token], rel=5e-5), (fqn, token)


@pytest.mark.parametrize(("family", "overrides"), FAMILIES, ids=IDS)
def test_names_sizes_and_weights(family: str, overrides: dict[str, Any]) -> None:
    model = tiny(family, **overrides)
    modules = {path: module for path, module in model.named_modules() if path.endswith(".experts")}
    expected = {
        f"{path}.{expert}.{name}": weight
        for path, module in modules.items()
        for expert in range(4)
        for name, weight in weights_of(module, expert).items()
    }
    names = ["gate_proj", "up_proj"] if family != "nemotron_h" else ["up_proj"]
    assert list(expected) == [
        f"{path}.{expert}.{name}" for path in modules for expert in range(4) for name in [*names, "down_proj"]
    ]
    sites = find_expert_sites(model)
    found = [projection for site in sites for projection in site.projections]
    assert [projection.fqn for projection in found] == list(expected)
    parameters = dict(model.named_parameters())
    for site in sites:
        with site.weights() as weights:
            for projection, local in zip(site.projections, weights, strict=True):
                assert local.projection == projection
                assert torch.equal(local.weight.dense(), expected[projection.fqn])
                assert local.weight.shape == (projection.out_features, projection.in_features)
                assert projection.storage == "expert_parameter"
                assert projection.type == f"experts.{projection.fqn.rpartition('.')[2]}"
                assert projection.stored_in in parameters
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
    assert [site.projections for site in find_expert_sites(meta)] == [site.projections for site in sites]


@torch.no_grad()
def test_an_expert_without_tokens_leaves_no_record() -> None:
    model = tiny("qwen3_moe")
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda _module, _args, output: (output[0], output[1], output[2].remainder(3))  # expert 3 never; some twice
        )
    sites, notes = find_expert_sites(model), Notes()
    with expert_inputs(model) as seen, attached(sites, notes):
        model(random_tokens(2, 9))
    assert any(len(set(picks)) < len(picks) for _, chosen in seen.values() for picks in chosen.tolist())
    gains, expected = notes.gains(), brute_force(model, seen)
    assert not any(".experts.3." in fqn for fqn in gains)
    assert {fqn: len(of) for fqn, of in gains.items()} == {fqn: len(of) for fqn, of in expected.items()}


@torch.no_grad()
def test_the_implementation_returns_after_the_last_site_and_after_an_error() -> None:
    model = tiny("mixtral")
    (own,) = implementations(model)
    sites, notes = find_expert_sites(model), Notes()
    first, last = sites[0].attach(notes), sites[-1].attach(notes)
    assert implementations(model) == {IMPLEMENTATION}
    first()
    first()
    assert implementations(model) == {IMPLEMENTATION}
    model(random_tokens(1, 6))
    assert {call[0] for call in notes.calls} <= {sites[-1]}
    last()
    assert implementations(model) == {own}

    class Fails(Notes):
        def record(self, *args: Any, **known: Any) -> None:
            raise RuntimeError("recorder")

    with pytest.raises(RuntimeError, match="recorder"), attached(sites, Fails()):
        model(random_tokens(1, 6))
    assert implementations(model) == {own}


@torch.no_grad()
def test_the_routing_weight_is_not_part_of_the_gain() -> None:
    model = tiny("qwen3_moe", num_hidden_layers=1)
    sites, plain, halved = find_expert_sites(model), Notes(), Notes()
    with attached(sites, plain):
        model(random_tokens(1, 6))
    model.model.layers[0].mlp.gate.register_forward_hook(lambda _m, _a, output: (output[0], output[1] / 2, output[2]))
    with attached(sites, halved):
        model(random_tokens(1, 6))
    assert plain.gains() == halved.gains()


@torch.no_grad()
def test_bfloat16_outputs_equal_the_eager_ones() -> None:
    model = tiny("qwen3_moe").to(torch.bfloat16)
    tokens = random_tokens(2, 9)
    model.set_experts_implementation("eager")
    eager, notes = model(tokens).logits, Notes()
    with attached(find_expert_sites(model), notes):
        assert torch.equal(model(tokens).logits, eager)
    assert all(row.dtype == torch.float32 for _, in_sq_T, out_sq, _ in notes.calls for row in [in_sq_T, *out_sq])


def zero_three_equals_whole(rank: int, family: str, overrides: dict[str, Any]) -> int:
    """Compare the sites of a model partitioned by ZeRO-3 with those of the whole model; return the number of calls."""
    import deepspeed

    whole, tokens = tiny(family, **overrides), random_tokens(2, 9, seed=rank)
    sites, expected = find_expert_sites(whole), Notes()
    with torch.no_grad(), attached(sites, expected):
        whole(tokens)
    deepspeed.init_distributed(dist_backend="gloo")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    engine, *_ = deepspeed.initialize(model=tiny(family, **overrides), config=config)
    parameter = engine.module.get_parameter(str(sites[0].projections[0].stored_in))
    assert parameter.shape == (0,), "not partitioned"

    partitioned, notes = find_expert_sites(engine.module, gathered), Notes()
    with torch.no_grad(), attached(partitioned, notes):
        engine(tokens)
    assert notes.gains() == expected.gains()
    for site, reference in zip(partitioned, sites, strict=True):
        assert site.projections == reference.projections
        with site.weights() as weights, reference.weights() as whole_weights:
            for local, known in zip(weights, whole_weights, strict=True):
                assert torch.equal(local.weight.dense(), known.weight.dense()), known.projection.fqn
    assert parameter.shape == (0,), "still gathered"
    return len(notes.calls)


LLAMA4 = {"hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4,
          "num_experts_per_tok": 2}  # fmt: skip
GRANITE = {key: LLAMA4[key] for key in LLAMA4 if key not in ("intermediate_size_mlp", "head_dim")}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "overrides"), [("qwen3_moe", {}), ("llama4_text", LLAMA4), ("granitemoe", GRANITE)])
def test_experts_partitioned_by_zero_three(family: str, overrides: dict[str, Any]) -> None:
    assert all(num_calls >= 8 for num_calls in run_ranks(2, zero_three_equals_whole, family, overrides))


def test_quantised_and_sharded_experts_are_refused() -> None:
    model = tiny("mixtral")
    experts: Any = model.model.layers[1].mlp.experts
    experts._hf_tp_plan = "moe_tp_experts"
    with pytest.raises(LayoutError, match=r"'model\.layers\.1\.mlp\.experts' are sharded .* use parallel\.tp=1"):
        find_expert_sites(model)
    del experts._hf_tp_plan
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ModelError, match=r"hold quantised weights \(torch\.float8_e4m3fn\)"):
        find_expert_sites(model)
