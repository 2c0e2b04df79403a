"""What no class tells: weights of unknown kinds, routers beside them, linears inside wrappers and adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    LoraModel,
    OFTConfig,
    PromptTuningConfig,
    ShiraConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import plop_dist
from plop_dist.backends.hf.linears import find_linears
from plop_dist.choose.diagnostics import diagnose
from plop_dist.errors import ModelError, PlacementError
from tests.models import random_tokens, tiny
from tests.sweep.family import build
from tests.sweep.table import architectures

BATCHES = [{"input_ids": random_tokens(2, 9)}]
NUM_EXPERTS = 4


class FlatExperts(nn.Module):
    """All experts in two 2-D parameters, one below the other, as DBRX keeps them."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.inner = inner
        self.w_in = nn.Parameter(torch.randn(NUM_EXPERTS * inner, hidden) / hidden**0.5)
        self.w_out = nn.Parameter(torch.randn(NUM_EXPERTS * inner, hidden) / inner**0.5)

    def forward(self, z: Tensor, shares: Tensor) -> Tensor:
        parts = zip(self.w_in.split(self.inner), self.w_out.split(self.inner), strict=True)
        outputs = [torch.relu(z @ w_in.T) @ w_out for w_in, w_out in parts]
        return sum(share[..., None] * output for share, output in zip(shares.unbind(-1), outputs, strict=True))  # type: ignore[return-value]


class ListedExperts(nn.Module):
    """One 2-D parameter for each expert, in a list."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        made = [torch.randn(hidden, hidden) / hidden**0.5 for _ in range(NUM_EXPERTS)]
        self.matrices = nn.ParameterList(made)

    def forward(self, z: Tensor, shares: Tensor) -> Tensor:
        outputs = [torch.einsum("bsi,oi->bso", z, matrix) for matrix in self.matrices]
        return sum(share[..., None] * output for share, output in zip(shares.unbind(-1), outputs, strict=True))  # type: ignore[return-value]


class StackedExperts(nn.Module):
    """A 3-D parameter in a class that nothing knows, multiplied in another dtype."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(NUM_EXPERTS, hidden, hidden) / hidden**0.5)

    def forward(self, z: Tensor, shares: Tensor) -> Tensor:
        output = torch.matmul(z.double()[:, None], self.weight.double()).float()
        return torch.einsum("besh,bse->bsh", output, shares)


class Mixture(nn.Module):
    """A block that knows its experts by a class of its own; the scale of the places is only added."""

    def __init__(self, experts: type[nn.Module], hidden: int, inner: int) -> None:
        super().__init__()
        self.chooses = nn.Linear(hidden, NUM_EXPERTS, bias=False)
        self.pool = experts(hidden, inner)
        self.places = nn.Parameter(torch.randn(64, hidden))

    def forward(self, z: Tensor) -> Tensor:
        z = z + 0.01 * self.places[: z.shape[1]]
        return self.pool(z, torch.softmax(self.chooses(z), dim=-1))


def with_experts(experts: type[nn.Module]) -> Any:
    model: Any = tiny("llama", num_experts=NUM_EXPERTS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in model.model.layers:
            layer.mlp = Mixture(experts, 64, 32)
    return model


@pytest.mark.parametrize(
    ("experts", "unknown"),
    [
        (FlatExperts, {"w_in", "w_out"}),
        (ListedExperts, {f"matrices.{index}" for index in range(NUM_EXPERTS)}),
        (StackedExperts, {"pool"}),
    ],
)
def test_experts_of_an_unknown_kind_are_reported_and_their_router_is_not_chosen(
    experts: type[nn.Module], unknown: set[str]
) -> None:
    scores = plop_dist.score(with_experts(experts), BATCHES)
    assert {entry.type for entry in scores.left_out} == unknown
    assert {entry.reason for entry in scores.left_out} == {"unknown_kind"}
    placement = plop_dist.place(scores, policy="all")
    assert set(placement.module_types) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for findings in (diagnose(scores), diagnose(scores, placement)):
        text = next(finding.text for finding in findings if "neither scored nor ever chosen" in finding.text)
        assert "model.layers.0.mlp.pool" in text
    assert plop_dist.place(scores, include=["chooses"], k=1, rank=4).module_types == ("chooses",)
    assert get_peft_model(with_experts(experts), placement.to_peft()).get_nb_trainable_parameters()[0] == (
        placement.num_trainable_parameters
    )


def test_what_is_only_added_or_looked_up_is_not_reported() -> None:
    model = tiny("gpt2", tie_word_embeddings=True)
    assert not plop_dist.score(model, BATCHES).left_out


ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(target_modules=["v_proj", "down_proj"], init_lora_weights=False),
    "ia3": lambda: IA3Config(
        target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "loha": lambda: LoHaConfig(target_modules=["v_proj", "down_proj"], init_weights=False),
    "lokr": lambda: LoKrConfig(target_modules=["v_proj", "down_proj"], init_weights=False),
    "vera": lambda: VeraConfig(target_modules=["v_proj"], init_weights=False),
    "oft": lambda: OFTConfig(target_modules=["v_proj", "down_proj"], oft_block_size=32, init_weights=False),
    "saved": lambda: LoraConfig(target_modules=["v_proj"], modules_to_save=["o_proj"], init_lora_weights=False),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_base_layers_of_any_adapter_are_scored(kind: str) -> None:
    adapted: Any = get_peft_model(tiny("llama"), ADAPTERS[kind]()).eval()
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Any:
        return lambda module, args: seen.update({name: (args[0].detach(), module.weight.detach())})

    for name, module in adapted.named_modules():
        if isinstance(module, nn.Linear) and not any(part in name for part in ("lora_", "vera_", "oft_")):
            module.register_forward_pre_hook(note(name.removesuffix(".base_layer")))
    scores = plop_dist.score(adapted, BATCHES)
    assert {module.type for module in scores.modules} == {module.type for module in plain().modules}
    assert {module.fqn for module in scores.modules} == {module.fqn for module in plain().modules}
    for module in scores.modules:
        name = f"base_model.model.{module.fqn}"
        z, weight = seen[name] if name in seen else seen[f"{name}.modules_to_save.default"]
        expected = ((z @ weight.T).norm(dim=-1) / z.norm(dim=-1)).mean()
        assert module.gain == pytest.approx(float(expected), rel=1e-5), module.fqn


def plain() -> plop_dist.Scores:
    return plop_dist.score(tiny("llama"), BATCHES)


def test_adapters_that_add_tokens_are_refused() -> None:
    model = get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ModelError, match=r"PROMPT_TUNING, which puts tokens of its own .*get_base_model"):
        plop_dist.score(model, BATCHES)


@pytest.mark.parametrize("wrap", ["mixed", "tuner"])
def test_paths_are_the_models_in_every_wrapper_of_peft(wrap: str) -> None:
    config = LoraConfig(target_modules=["v_proj"])
    if wrap == "mixed":
        adapted: Any = get_peft_model(tiny("llama"), config, mixed=True)
    else:
        adapted = LoraModel(tiny("llama"), config, "default")
    scores = plop_dist.score(adapted.eval(), BATCHES)
    assert {module.fqn: module.gain for module in scores.modules} == pytest.approx(
        {module.fqn: module.gain for module in plain().modules}, rel=1e-5
    )


def test_a_method_that_wraps_more_than_linears_is_refused() -> None:
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match=r"AdaptionPromptModel, which changes more .*before it is wrapped"):
        plop_dist.score(get_peft_model(tiny("llama"), config), BATCHES)


@pytest.mark.parametrize(
    "config",
    [
        HRAConfig(target_modules=["q_proj"], r=2),
        ShiraConfig(target_modules=["q_proj"], r=2),
        LNTuningConfig(target_modules=["q_proj"]),  # a copy of the whole linear
    ],
    ids=["hra", "shira", "copy"],
)
def test_an_adapter_that_multiplies_in_the_place_of_its_linear_is_refused(config: Any) -> None:
    model: Any = get_peft_model(tiny("llama"), config)
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj' is wrapped by peft\..* another weight inst"):
        plop_dist.score(model, BATCHES)
    with model.disable_adapter():
        scores = plop_dist.score(model, BATCHES)
    assert {module.fqn: module.nfn for module in scores.modules} == pytest.approx(
        {module.fqn: module.nfn for module in plain().modules}, rel=1e-5
    )


def test_a_module_that_is_trained_whole_is_scored_as_it_runs() -> None:
    model: Any = get_peft_model(tiny("llama"), LoraConfig(target_modules=["v_proj"], modules_to_save=["down_proj"]))
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.down_proj.modules_to_save.default.weight.mul_(
            torch.linspace(0, 3, 64)[:, None]
        )
    fqn = "model.layers.0.mlp.down_proj"
    trained = {module.fqn: module.gain for module in plop_dist.score(model, BATCHES).modules}
    with model.disable_adapter():
        base = {module.fqn: module.gain for module in plop_dist.score(model, BATCHES).modules}
    expected = {module.fqn: module.gain for module in plain().modules}
    assert base == pytest.approx(expected, rel=1e-5)
    assert trained[fqn] != pytest.approx(expected[fqn], rel=1e-2)


def test_an_unknown_wrapper_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_layer = base

        def forward(self, z: Tensor) -> Tensor:
            return self.base_layer(z) * 2

    model: Any = tiny("llama")
    model.model.layers[1].mlp.up_proj = Twice(model.model.layers[1].mlp.up_proj)
    with pytest.raises(ModelError, match=r"'model\.layers\.1\.mlp\.up_proj' \(Twice\) wraps another one"):
        find_linears(model)


class Clipped(nn.Module):
    """Gemma 4's ClippableLinear: a module by the linear's name around a linear called linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z.clamp(-100, 100)).clamp(-1000, 1000)


def test_names_reach_no_wrapper_around_a_linear() -> None:
    model: Any = tiny("llama")
    attention = model.model.layers[1].self_attn
    attention.q_proj, attention.k_proj = Clipped(attention.q_proj), Clipped(attention.k_proj)
    scores = plop_dist.score(model, BATCHES)
    for include in (["q_proj", "v_proj"], ["q_proj.linear"], ["k_proj", "k_proj.linear"]):
        placement = plop_dist.place(scores, policy="all", include=include)
        adapted: Any = get_peft_model(copy.deepcopy(model), placement.to_peft())
        names = {name.partition(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}
        assert names == {f"base_model.model.{fqn}" for fqn in placement.modules}
    with pytest.raises(PlacementError, match="matches no module"):
        plop_dist.place(scores, include=["q_projection"])


@pytest.mark.parametrize("options", [{"online_quant": True}, {"online_quant": True, "use_rms_norm": True}, {}])
def test_bitnet_is_scored_by_what_it_multiplies_by(options: dict[str, bool]) -> None:
    from transformers.integrations.bitnet import AutoBitLinear

    torch.manual_seed(0)  # a number between two roundings falls here and there: the masks of both passes differ
    model: Any = tiny("llama")
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    linear = torch.nn.functional.linear
    for path, plain_linear in list(model.named_modules()):
        if isinstance(plain_linear, nn.Linear) and path != "lm_head":
            ternary = AutoBitLinear(plain_linear.in_features, plain_linear.out_features, bias=False, **options)
            ternary.weight.data.copy_(plain_linear.weight)
            if not options:
                ternary.weight_scale.fill_(3.0)
            if options.get("use_rms_norm"):
                ternary.rms_norm.weight.data.uniform_(0.2, 3.0)  # type: ignore[union-attr]
            model.set_submodule(path, ternary.eval())
    scores = plop_dist.score(model, BATCHES, baseline="closed_form")
    names = {id(module.weight): path for path, module in model.named_modules() if isinstance(module, AutoBitLinear)}

    def noting(z: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
        seen[current[-1]] = (z, weight)
        return linear(z, weight, bias)

    current: list[str] = []
    for module in model.modules():
        if id(getattr(module, "weight", None)) in names:
            module.register_forward_pre_hook(lambda one, _: current.append(names[id(one.weight)]))
    torch.nn.functional.linear = noting
    try:
        with torch.no_grad():
            model.model(**BATCHES[0])
    finally:
        torch.nn.functional.linear = linear
    assert scores.modules
    for module in scores.modules:
        z, weight = seen[module.fqn]
        gain = ((z @ weight.T).norm(dim=-1) / z.norm(dim=-1)).mean()
        assert module.gain == pytest.approx(float(gain), rel=1e-5), module.fqn
        assert module.baseline == pytest.approx(float(weight.norm()) / module.in_features**0.5, rel=1e-5)


# transformers 5.24 has made the router of GraniteMoE a linear of its own.
GRANITE = "layer" if tuple(map(int, version("transformers").split(".")[:2])) < (5, 24) else "router"


@pytest.mark.parametrize(
    ("family", "roles"),
    [
        ("llama", {}),
        ("mixtral", {"gate": "router"}),
        ("qwen2_moe", {"gate": "router", "shared_expert_gate": "router"}),
        ("granitemoe", {GRANITE: "router"}),
        ("deepseek_v3", {"gate": "router"}),
        ("aria_text", {"router": "router"}),
        ("mamba", {"in_proj": "recurrent", "x_proj": "recurrent", "dt_proj": "recurrent", "out_proj": "kernel"}),
        ("recurrent_gemma", {"linear_x": "recurrent", "linear_y": "recurrent", "linear_out": "recurrent"}),
        ("jamba", {"in_proj": "recurrent", "x_proj": "recurrent", "dt_proj": "recurrent", "out_proj": "recurrent",
                   "router": "router"}),
        ("falcon_h1", {"in_proj": "recurrent", "out_proj": "kernel"}),
    ],
)  # fmt: skip
def test_routers_and_recurrent_layers_are_told_by_structure(family: str, roles: dict[str, str]) -> None:
    model = build(family, architectures()[family])
    found = {
        block.projection.type: block.projection.role
        for linear in find_linears(model)
        for block in linear.blocks
        if block.projection.role or block.projection.type in roles
    }
    assert found == roles


class Attends(nn.Module):
    """A host's own model: torch's attention keeps q, k and v in one bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.up = nn.Linear(32, 48)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        z = self.embed(input_ids)
        return self.up(z + self.attention(z, z, z, need_weights=False)[0])


def test_what_torchs_own_attention_multiplies_by_is_reported() -> None:
    scores = plop_dist.score(Attends(), BATCHES)
    assert {module.fqn: module.reason for module in scores.left_out} == {
        "attention.in_proj_weight": "unknown_kind",
        "attention.out_proj": "no_tokens",
    }


def test_what_a_linears_weight_is_made_of_is_not_reported() -> None:
    model: Any = tiny("llama")
    parametrizations.spectral_norm(model.model.layers[0].mlp.down_proj)
    scores = plop_dist.score(model, BATCHES)
    assert not scores.left_out
    assert "model.layers.0.mlp.down_proj" in {module.fqn for module in scores.modules}


@pytest.mark.parametrize("parameter", ["mlp.experts.down_proj", "self_attn.v_proj.weight"])
def test_a_trained_adapter_on_a_parameter_is_refused(parameter: str) -> None:
    config = LoraConfig(r=4, target_modules=[], target_parameters=[parameter])
    adapted: Any = get_peft_model(tiny("mixtral"), config)
    fresh = {module.fqn: module.nfn for module in plop_dist.score(adapted, BATCHES).modules}
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    with pytest.raises(ModelError, match=r"adapter of PEFT's on its parameter '\w+', .*model\.disable_adapter"):
        plop_dist.score(adapted, BATCHES)
    with adapted.disable_adapter():
        base = {module.fqn: module.nfn for module in plop_dist.score(adapted, BATCHES).modules}
    assert base == pytest.approx(fresh, rel=1e-6)
    plain = {module.fqn: module.nfn for module in plop_dist.score(tiny("mixtral"), BATCHES).modules}
    assert base == pytest.approx(plain, rel=1e-6)
