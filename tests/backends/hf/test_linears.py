"""Every family's linear maps: their names, and their gains and weights against float64 brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import plop_dist
from plop_dist.backends.hf.linears import LinearModule, find_linears
from plop_dist.backends.hf.sites import LinearSite
from plop_dist.errors import ModelError
from plop_dist.measure.blocks import Rows
from tests.models import random_tokens, tiny, tiny_config

BATCHES = [{"input_ids": random_tokens(2, 9)}]
LLAMA = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
NEOX_MLP = ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
# family -> path of its layers, the projections of its last layer (in any order), its head
EXPECTED: dict[str, tuple[str, list[str], str]] = {
    "llama": ("model.layers", [*LLAMA, *MLP], "lm_head"),
    "qwen2": ("model.layers", [*LLAMA, *MLP], "lm_head"),
    "qwen3": ("model.layers", [*LLAMA, *MLP], "lm_head"),
    "phi3": ("model.layers", [*LLAMA, *MLP], "lm_head"),
    "mixtral": ("model.layers", [*LLAMA, "mlp.gate"], "lm_head"),
    "qwen3_moe": ("model.layers", [*LLAMA, "mlp.gate"], "lm_head"),
    "gpt_oss": ("model.layers", [*LLAMA, "mlp.router"], "lm_head"),
    "gpt2": (
        "transformer.h",
        ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
        "lm_head",
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.dense", *NEOX_MLP],
        "embed_out",
    ),
    "falcon": (
        "transformer.h",
        ["self_attention.q_proj", "self_attention.k_proj", "self_attention.v_proj", "self_attention.dense", *NEOX_MLP],
        "lm_head",
    ),
    "mamba": ("backbone.layers", ["mixer.in_proj", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"], "lm_head"),
}
QWEN3_NEXT_MLP = ["mlp.gate", "mlp.shared_expert_gate", *(f"mlp.shared_expert.{name.split('.')[1]}" for name in MLP)]
QWEN3_NEXT = [
    *(f"model.layers.0.{name}" for name in QWEN3_NEXT_MLP),
    *(f"model.layers.0.linear_attn.{name}" for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")),
    *(f"model.layers.1.{name}" for name in [*LLAMA, *QWEN3_NEXT_MLP]),
    "lm_head",
]

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in [*EXPECTED, "qwen3_next"]),
    ("falcon", {"new_decoder_architecture": True}),
    ("falcon", {"multi_query": False, "num_kv_heads": 8, "bias": True}),
    ("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "multi_query": True}),
    ("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "multi_query": False}),
    ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    ("codegen", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}),
    ("persimmon", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}),
    ("glm4", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 8}),
]  # fmt: skip


def variant_id(variant: Any) -> str | None:
    return variant if isinstance(variant, str) else "-".join(f"{key}={value}" for key, value in variant.items())[:40]


class Notes:
    """A recorder that keeps every call."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def sq_norm(self, z_TI: Tensor) -> Tensor:
        return z_TI.float().square().sum(-1).reshape(-1)

    def record(self, site: Any, in_sq_T: Tensor, out_sq_T: list[Tensor], **known: Any) -> None:
        self.calls.append(
            {"site": site, "in_sq": in_sq_T.clone(), "out_sq": [row.clone() for row in out_sq_T], **known}
        )


@pytest.mark.parametrize("family", EXPECTED)
def test_names_and_storage(family: str) -> None:
    layers, names, head = EXPECTED[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    head = head if head in modules else "lm_head"  # which GPT-NeoX's is called in newer releases
    found = [block.projection for linear in find_linears(model) for block in linear.blocks]
    expected = {f"{layers}.{layer}.{name}" for layer in range(2) for name in names} | {head}
    assert {projection.fqn for projection in found} == expected
    assert len(found) == len(expected)
    for projection in found:
        assert projection.type == ("lm_head" if projection.fqn == head else projection.fqn.rpartition(".")[2])
        assert projection.layer == (None if projection.fqn == head else int(projection.fqn.split(".")[2]))
        if projection.storage == "expert_parameter":
            assert projection.holder in parameters
        else:
            holder = modules[projection.holder]
            assert (projection.storage == "fused") == (projection.fqn not in modules)
            assert isinstance(holder, nn.Linear | Conv1D)


def test_linear_attention_projections_are_types_of_their_own() -> None:
    found = [block.projection for linear in find_linears(tiny("qwen3_next")) for block in linear.blocks]
    assert sorted(projection.fqn for projection in found) == sorted(QWEN3_NEXT)


def test_storage_of_fused_and_transposed_weights() -> None:
    found = {block.projection.fqn: block.projection for linear in find_linears(tiny("gpt2")) for block in linear.blocks}
    key = found["transformer.h.0.attn.k_proj"]
    assert (key.storage, key.stored_in, key.in_features, key.out_features) == (
        "fused",
        "transformer.h.0.attn.c_attn",
        64,
        64,
    )
    up = found["transformer.h.0.mlp.c_fc"]
    assert (up.storage, up.stored_in, up.in_features, up.out_features) == ("conv1d", None, 64, 256)
    assert found["transformer.h.0.attn.c_proj"].type == found["transformer.h.0.mlp.c_proj"].type == "c_proj"


@pytest.mark.parametrize(("family", "overrides"), VARIANTS, ids=variant_id)
def test_gains_and_weights_equal_brute_force(family: str, overrides: dict[str, Any]) -> None:
    model = tiny(family, **overrides)
    tokens = random_tokens(2, 7)
    with torch.no_grad():
        before = model(tokens).logits
    linears = find_linears(model)
    inputs: dict[str, Tensor] = {}
    handles = [
        linear.module.register_forward_pre_hook(
            lambda _module, args, path=linear.path: inputs.__setitem__(path, args[0].clone())
        )
        for linear in linears
    ]
    notes = Notes()
    sites = {linear.path: LinearSite(linear) for linear in linears}
    removers = [site.attach(notes) for site in sites.values()]
    with torch.no_grad():
        during = model(tokens).logits
    for remove in [*removers, *(handle.remove for handle in handles)]:
        remove()
    with torch.no_grad():
        assert torch.equal(before, during)
        assert torch.equal(before, model(tokens).logits)
    paths = {site: path for path, site in sites.items()}
    assert {paths[call["site"]] for call in notes.calls} == set(inputs)
    # Newer releases multiply with the weight of Mamba's dt_proj themselves: neither a hook nor an adapter sees that.
    assert {path.rpartition(".")[2] for path in sites.keys() - inputs.keys()} <= {"dt_proj"}
    for call in notes.calls:
        linear = next(linear for linear in linears if linear.path == paths[call["site"]])
        z_TI = inputs[linear.path].flatten(0, -2).double()
        with call["site"].weights() as weights:
            local = list(weights)
        for block, weight, out_sq in zip(linear.blocks, local, call["out_sq"], strict=True):
            expected_OI = brute_force_weight(model, family, linear, block.projection.fqn, overrides)
            assert torch.equal(weight.weight.dense(), expected_OI), block.projection.fqn
            assert expected_OI.shape == (block.projection.out_features, block.projection.in_features)
            gain = (z_TI @ expected_OI.double().T).norm(dim=1) / z_TI.norm(dim=1)
            # atol: a one-row gate can cancel down to float32 rounding.
            torch.testing.assert_close((out_sq / call["in_sq"]).sqrt().double(), gain, rtol=2e-5, atol=1e-7)


def brute_force_weight(
    model: nn.Module, family: str, linear: LinearModule, fqn: str, overrides: dict[str, Any]
) -> Tensor:
    """Return the projection's weight (O, I) from the module's, row by row, by what each family's paper code does."""
    module, name = linear.module, fqn.rpartition(".")[2]
    weight_OI = module.weight.detach()
    if isinstance(module, Conv1D):
        weight_OI = weight_OI.T
    if len(linear.blocks) == 1:
        return weight_OI
    num_rows = weight_OI.shape[0]
    if name in ("gate_proj", "up_proj"):
        return weight_OI[: num_rows // 2] if name == "gate_proj" else weight_OI[num_rows // 2 :]
    part = {"q_proj": 0, "k_proj": 1, "v_proj": 2}[name]
    config: Any = model.config
    heads = config.num_attention_heads
    head_dim = config.hidden_size // heads
    owner: list[int] = []
    if family in ("gpt_neox", "bloom", "persimmon") or overrides.get("multi_query") is False:
        owner = [0, 1, 2] * heads
    elif overrides.get("new_decoder_architecture"):
        owner = ([0] * (heads // config.num_kv_heads) + [1, 2]) * config.num_kv_heads
    elif family == "codegen":
        owner = ([0] * (heads // 4) + [2] * (heads // 4) + [1] * (heads // 4)) * 4
    elif family in ("falcon", "gpt_bigcode"):
        owner = [0] * heads + [1, 2]
    else:
        kv_heads = getattr(config, "num_key_value_heads", heads)
        owner = [0] * heads + [1] * kv_heads + [2] * kv_heads
    rows = [head * head_dim + row for head, who in enumerate(owner) if who == part for row in range(head_dim)]
    assert len(owner) * head_dim == num_rows
    return weight_OI[rows]


def test_attention_is_silent_without_the_rows_called_value() -> None:
    """The layouts are the modeling code's: of the three parts, zeroing v and only v silences the attention."""
    variants: list[tuple[str, dict[str, Any]]] = [
        (family, overrides) for family, overrides in VARIANTS
        if family in ("falcon", "gpt_neox", "gpt2", "phi3", "bloom", "mpt", "persimmon", "gpt_bigcode", "codegen")
    ]  # fmt: skip
    for family, overrides in variants:
        model = tiny(family, **overrides)
        linears = find_linears(model)
        fused = next(linear for linear in linears if len(linear.blocks) == 3)
        output = next(linear for linear in linears if linear.path.endswith((".dense", "o_proj", "c_proj", "out_proj")))
        seen: dict[str, Tensor] = {}
        output.module.register_forward_pre_hook(lambda _module, args, seen=seen: seen.update(z=args[0].clone()))
        with torch.no_grad():
            weight = fused.module.weight.T if fused.is_transposed else fused.module.weight
            if fused.module.bias is not None:
                fused.module.bias.zero_()
            for block in fused.blocks:
                kept = weight.clone()
                rows = torch.arange(weight.shape[0])[:, None]
                weight[block.take_rows(rows).flatten()] = 0
                model(random_tokens(1, 5))
                weight.copy_(kept)
                is_value = block.projection.type == "v_proj"
                assert bool((seen["z"] == 0).all()) == is_value, (family, overrides, block.projection.fqn)


def test_a_shard_of_whole_periods_is_taken_like_the_whole() -> None:
    linears = find_linears(tiny("gpt_neox"))
    block = next(linear for linear in linears if len(linear.blocks) == 3).blocks[1]
    assert block.rows == Rows(period=48, start=16, stop=32)
    y_TO = torch.arange(2 * 192.0).view(2, 192)
    shards = [block.take(shard) for shard in y_TO.chunk(2, dim=1)]
    assert torch.equal(torch.cat(shards, dim=1), block.take(y_TO))


def test_a_contiguous_block_is_a_view() -> None:
    linears = find_linears(tiny("phi3"))
    block = next(linear for linear in linears if len(linear.blocks) == 3).blocks[1]
    y_TO = torch.zeros(3, 5, 128)
    assert block.take(y_TO).untyped_storage().data_ptr() == y_TO.untyped_storage().data_ptr()


def test_an_unknown_fused_layout_is_scored_whole_under_its_own_name() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv_proj = nn.Linear(8, 24)

    model = nn.ModuleDict({"attn": Attention()})
    (linear,) = find_linears(model)
    assert [(block.projection.fqn, block.rows) for block in linear.blocks] == [("attn.qkv_proj", None)]


def test_a_shared_module_is_found_once() -> None:
    shared = nn.Linear(4, 4)
    assert [linear.path for linear in find_linears(nn.ModuleDict({"a": shared, "b": shared}))] == ["a"]


def test_quantised_weights_are_refused() -> None:
    class Linear4bit(nn.Linear):
        pass

    model = tiny("llama")
    packed = Linear4bit(8, 8)
    packed.weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    model.model.layers[1].mlp.up_proj = packed
    with pytest.raises(
        ModelError, match=r"'model\.layers\.1\.mlp\.up_proj' holds quantised weights \(Linear4bit, .*uint8"
    ):
        find_linears(model)


def test_a_function_in_the_place_of_a_linears_forward_is_scored_by_what_it_multiplies_by() -> None:
    model: Any = tiny("llama")
    linear = model.model.layers[0].mlp.down_proj
    plain = {module.fqn: module.nfn for module in plop_dist.score(model, BATCHES).modules}
    linear.forward = lambda z: nn.functional.linear(z, linear.weight * 3)
    scores = {module.fqn: module.nfn for module in plop_dist.score(model, BATCHES).modules}
    assert scores["model.layers.0.mlp.down_proj"] == pytest.approx(plain["model.layers.0.mlp.down_proj"], rel=1e-5)
    linear.forward = lambda z: z @ linear.weight.T * 3
    with pytest.raises(
        ModelError, match=r"down_proj' \(Linear\) returns something else than its weight times its input"
    ):
        plop_dist.score(model, BATCHES)


@pytest.mark.parametrize("method", ["pruned", "weight_norm"])
def test_a_weight_that_a_hook_makes_is_the_one_of_the_next_forward_pass(method: str) -> None:
    model: Any = tiny("llama")
    linear = model.model.layers[0].mlp.down_proj
    if method == "pruned":
        prune.random_unstructured(linear, "weight", 0.5)
        made_of = linear.weight_orig
    else:
        nn.utils.weight_norm(linear)
        made_of = linear.weight_g
    with torch.no_grad():
        made_of.mul_(3)  # as an optimizer's step, or a checkpoint that is loaded, leaves it
        found = {module.fqn: module for module in plop_dist.score(model, BATCHES, baseline="closed_form").modules}
        model(**BATCHES[0])
    expected = float(linear.weight.norm()) / linear.in_features**0.5
    assert found["model.layers.0.mlp.down_proj"].baseline == pytest.approx(expected, rel=1e-5)
