"""Transformer Engine's linears, which do not run here: torch modules with their names, attributes and formulae."""

# T tokens, I in_features, O out_features

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plop_dist.backends.megatron.checks import check_called
from plop_dist.backends.megatron.classes import check_router, linear_kind
from plop_dist.backends.megatron.names import conventional_names, find_named_linears
from plop_dist.backends.megatron.sites import MegatronSite, RoutedSite, RouterSite
from plop_dist.errors import ModelError
from plop_dist.measure.blocks import Block
from plop_dist.measure.norms import local_sq_norm
from plop_dist.measure.protocols import Routing
from plop_dist.values.scores import Projection

HIDDEN, HEADS, GROUPS, INNER = 8, 4, 2, 6  # two dimensions per head


class TELinear(nn.Module):
    """y = W x, with the bias added or, where te_return_bias, handed on beside it."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, returns_bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * torch.rand(out_features, 1) * 3)
        self.bias = nn.Parameter(torch.randn(out_features)) if bias else torch.empty(0)
        self.use_bias, self.te_return_bias = bias, returns_bias and bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y = x @ self.weight.T
        if self.te_return_bias:
            return y, self.bias
        return (y + self.bias if self.use_bias else y), None


class TEColumnParallelLinear(TELinear):
    pass


class TERowParallelLinear(TELinear):
    pass


class TELayerNormColumnParallelLinear(TELinear):
    """y = W norm(x): the hook's input is the one before the norm."""

    def __init__(self, *sizes: int, normalization: str, zero_centered_gamma: bool, **bias: bool) -> None:
        super().__init__(*sizes, **bias)
        self.normalization, self.zero_centered_gamma, self.eps = normalization, zero_centered_gamma, 1e-3
        self.layer_norm_weight = nn.Parameter(torch.randn(sizes[0]))
        self.layer_norm_bias = nn.Parameter(torch.randn(sizes[0])) if normalization == "LayerNorm" else None

    def norm(self, x: Tensor) -> Tensor:
        gain = self.layer_norm_weight + (1 if self.zero_centered_gamma else 0)
        if self.normalization == "RMSNorm":
            return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * gain
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt() * gain + self.layer_norm_bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().forward(self.norm(x))


class TEGroupedLinear(nn.Module):
    """One weight per expert; reads all experts' tokens one after the other."""

    def __init__(self, num_gemms: int, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.num_gemms, self.use_bias, self.te_return_bias = num_gemms, bias, False
        for slot in range(num_gemms):
            setattr(self, f"weight{slot}", nn.Parameter(torch.randn(out_features, in_features) * (slot + 1)))
            setattr(self, f"bias{slot}", nn.Parameter(torch.randn(out_features)))

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, None]:
        outs = []
        for slot, part in enumerate(x.split(m_splits)):
            y = part @ getattr(self, f"weight{slot}").T
            outs.append(y + getattr(self, f"bias{slot}") if self.use_bias else y)
        return torch.cat(outs), None


class TEColumnParallelGroupedLinear(TEGroupedLinear):
    pass


class TERowParallelGroupedLinear(TEGroupedLinear):
    pass


class Seen:
    """A recorder that keeps the last call of every site."""

    def __init__(self) -> None:
        self.calls: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self.maps: dict[str, Tensor] = {}

    def record(self, site: Any, in_sq_T: Tensor, out_sq_T: list[Tensor], **_: Any) -> None:
        self.calls[id(site)] = (in_sq_T, out_sq_T)

    def record_routing(self, router: str, map_TE: Tensor) -> None:
        self.maps[router] = map_TE

    def sq_norm(self, z: Tensor) -> Tensor:
        return local_sq_norm(z)


def watch(site: Any, *args: Any) -> tuple[Tensor, list[Tensor]]:
    """Return what the site records in one call; no hook may be left, and the output must be the same."""
    seen, expected = Seen(), site.module(*args)
    remove = site.attach(seen)
    found = site.module(*args)
    remove()
    assert torch.equal(found[0], expected[0])
    assert not site.module._forward_hooks
    return seen.calls[id(site)]


def projection(fqn: str, weight: Tensor) -> Projection:
    return Projection(fqn=fqn, type=fqn, layer=0, in_features=weight.shape[1], out_features=weight.shape[0])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("zero_centered_gamma", [False, True])
@pytest.mark.parametrize(("bias", "returns_bias"), [(False, False), (True, False), (True, True)])
def test_te_layernorm_column_parallel_linear_is_scored_on_the_normed_input(
    normalization: str, zero_centered_gamma: bool, bias: bool, returns_bias: bool
) -> None:
    linear = TELayerNormColumnParallelLinear(
        HIDDEN, 16, normalization=normalization, zero_centered_gamma=zero_centered_gamma, bias=bias,
        returns_bias=returns_bias,
    )  # fmt: skip
    assert linear_kind(linear) == "column"
    x = torch.randn(5, 2, HIDDEN) * 7 + 3
    in_sq_T, (out_sq_T,) = watch(MegatronSite(linear, [Block(projection("up_proj", linear.weight))], "column"), x)
    z_TI = linear.norm(x).reshape(-1, HIDDEN)
    torch.testing.assert_close(in_sq_T, z_TI.square().sum(1))
    torch.testing.assert_close(out_sq_T, (z_TI @ linear.weight.T).square().sum(1))
    assert not torch.allclose(in_sq_T, local_sq_norm(x)), "the input before the norm would do"


@pytest.mark.parametrize("cls", [TEColumnParallelLinear, TERowParallelLinear, TELinear])
@pytest.mark.parametrize("returns_bias", [False, True])
def test_te_linears_leave_the_bias_out(cls: type[TELinear], returns_bias: bool) -> None:
    linear = cls(HIDDEN, 6, bias=True, returns_bias=returns_bias)
    kind = linear_kind(linear)
    assert (
        kind
        == {"TEColumnParallelLinear": "column", "TERowParallelLinear": "row", "TELinear": "duplicated"}[cls.__name__]
    )
    x = torch.randn(4, 3, HIDDEN)
    in_sq_T, (out_sq_T,) = watch(MegatronSite(linear, [Block(projection("o_proj", linear.weight))], kind), x)
    torch.testing.assert_close(in_sq_T, local_sq_norm(x))
    torch.testing.assert_close(out_sq_T, local_sq_norm(x @ linear.weight.T))


@pytest.mark.parametrize("bias", [False, True])
def test_te_grouped_linear_is_scored_expert_by_expert(bias: bool) -> None:
    linear = TEColumnParallelGroupedLinear(3, HIDDEN, 6, bias)
    assert linear_kind(linear) == "grouped_column"
    splits, x_TI = [4, 0, 3], torch.randn(7, HIDDEN)
    for slot, rows in enumerate((x_TI[:4], x_TI[4:4], x_TI[4:])):
        weight = getattr(linear, f"weight{slot}")
        site = RoutedSite(linear, [Block(projection("up_proj", weight))], Routing("router", slot), slot)
        in_sq_T, (out_sq_T,) = watch(site, x_TI, splits)
        torch.testing.assert_close(in_sq_T, local_sq_norm(rows))
        torch.testing.assert_close(out_sq_T, local_sq_norm(rows @ weight.T))
        with site.weights() as weights:
            assert torch.equal(next(iter(weights)).weight.dense(), weight)


class TERowParallelLinearLayerNorm(TERowParallelLinear):
    """Bridge's for Gemma 2 and 3: the norm after the projection is part of the linear."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y, bias = super().forward(x)
        return nn.functional.rms_norm(y, y.shape[-1:]), bias


class SquaredLinear(TERowParallelLinear):
    """Of a class that nobody knows."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y, bias = super().forward(x)
        return y.square(), bias


def test_a_norm_inside_a_row_parallel_linear_is_left_out() -> None:
    linear, x = TERowParallelLinearLayerNorm(INNER, HIDDEN), torch.randn(4, 3, INNER)
    assert linear_kind(linear) == "row"
    site = MegatronSite(linear, [Block(projection("o_proj", linear.weight))], "row")
    in_sq_T, (out_sq_T,) = watch(site, x)
    torch.testing.assert_close(in_sq_T, local_sq_norm(x))
    torch.testing.assert_close(out_sq_T, local_sq_norm(x @ linear.weight.T))
    assert not torch.allclose(out_sq_T, local_sq_norm(linear(x)[0])), "the output of the module would do"
    assert type(linear) is TERowParallelLinearLayerNorm


def test_a_single_module_extended_under_its_own_name_is_known_by_what_extends_it() -> None:
    linear = TEColumnParallelLinear(HIDDEN, 6)
    linear.__class__ = type("TEColumnParallelLinear", (Gemma2OutputLayer, TEColumnParallelLinear), {})  # as Bridge does
    x = torch.randn(4, 3, HIDDEN)
    _, (out_sq_T,) = watch(MegatronSite(linear, [Block(projection("lm_head", linear.weight))], "column"), x)
    torch.testing.assert_close(out_sq_T, local_sq_norm(x @ linear.weight.T))


class Gemma2OutputLayer(TELinear):
    """Bridge's head with a soft cap."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y, bias = super().forward(x)
        return torch.tanh(y), bias


class OddLinear(nn.Linear):
    """Torch's linear, and something besides."""


def test_what_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"'layers\.0\.o' is a .*\.SquaredLinear, which computes more than its TERow"):
        linear_kind(SquaredLinear(INNER, HIDDEN), "layers.0.o")
    with pytest.raises(ModelError, match=r"'layers\.0\.mlp\.up' is a .*OddLinear, which holds a matrix"):
        linear_kind(OddLinear(HIDDEN, 6), "layers.0.mlp.up")
    assert linear_kind(nn.Linear(HIDDEN, 6), "layers.0.per_layer_input_gate") == "duplicated"
    assert linear_kind(nn.Linear(HIDDEN, 1), "value_head") is None
    with pytest.raises(ModelError, match=r"'mlp\.router' is a .*\.ScaledRouter, whose gating is not known to be W z"):
        check_router(ScaledRouter(), "mlp.router")
    check_router(TopKRouter(), "mlp.router")


def test_a_linear_that_saw_nothing_of_a_pass_is_an_error_that_names_it() -> None:
    """Its weight went into another product: kv_b_proj, absorbed into the queries."""
    used, absorbed = TELinear(HIDDEN, 6), TELinear(HIDDEN, 6)
    sites = [MegatronSite(m, [Block(projection(name, m.weight))], "duplicated") for m, name in
             ((used, "q_a_proj"), (absorbed, "kv_b_proj"))]  # fmt: skip
    check_called(sites)
    detach = [site.attach(Seen()) for site in sites]
    used(torch.randn(2, 1, HIDDEN))
    with pytest.raises(ModelError, match="'kv_b_proj' is a TELinear whose weight Megatron uses without calling it"):
        check_called(sites)
    for remove in detach:
        remove()
    check_called(sites)


class TopKRouter(nn.Module):
    """Megatron's router: gating gives logits, forward gives probabilities and the map."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, HIDDEN)), nn.Parameter(torch.randn(3))

    def gating(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gating(x).reshape(-1, 3)
        return logits.softmax(-1), logits >= logits.max(-1, keepdim=True).values


class ScaledRouter(TopKRouter):
    def gating(self, x: Tensor) -> Tensor:
        return 2 * super().gating(x)


def test_a_router_is_a_linear_of_its_own_and_says_who_goes_where() -> None:
    router, x = TopKRouter(), torch.randn(4, 2, HIDDEN)
    site = RouterSite(router, "mlp.router", projection("gate", router.weight))
    in_sq_T, (out_sq_T,) = watch(site, x)
    torch.testing.assert_close(in_sq_T, local_sq_norm(x))
    torch.testing.assert_close(out_sq_T, local_sq_norm(x @ router.weight.T))
    assert "gating" not in vars(router)


def transformer_engine_chunk() -> tuple[nn.Module, Any]:
    """Return a chunk that holds layer 3 (a dense one) and layer 4 (experts 2 and 3 of 4) as Megatron names them."""
    norm = {"normalization": "RMSNorm", "zero_centered_gamma": False}
    attention = nn.Module()
    attention.linear_qkv = TELayerNormColumnParallelLinear(HIDDEN, (HEADS + 2 * GROUPS) * 2, bias=True, **norm)
    attention.linear_proj = TERowParallelLinear(HIDDEN, HIDDEN)
    dense, routed, experts = nn.Module(), nn.Module(), nn.Module()
    dense.linear_fc1 = TELayerNormColumnParallelLinear(HIDDEN, 2 * INNER, **norm)
    dense.linear_fc2 = TERowParallelLinear(INNER, HIDDEN)
    experts.linear_fc1 = TEColumnParallelGroupedLinear(2, HIDDEN, 2 * INNER)
    experts.linear_fc2 = TERowParallelGroupedLinear(2, INNER, HIDDEN)
    routed.router, routed.experts, routed.shared_experts = TopKRouter(), experts, nn.Module()
    routed.shared_experts.linear_fc1 = TEColumnParallelLinear(HIDDEN, 2 * INNER)
    routed.shared_experts.linear_fc2 = TERowParallelLinear(INNER, HIDDEN)
    chunk = nn.Module()
    chunk.decoder = nn.Module()
    chunk.decoder.layers = nn.ModuleList([nn.Module(), nn.Module()])
    for number, (layer, mlp) in enumerate(zip(chunk.decoder.layers, (dense, routed), strict=True)):
        layer.layer_number = 4 + number  # counted from 1, over all pipeline stages
        layer.self_attention, layer.mlp = attention, mlp
    config = SimpleNamespace(
        num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=2, hidden_size=HIDDEN, gated_linear_unit=True
    )
    return chunk, config


def test_a_model_of_te_modules_gets_hugging_face_names_and_rows() -> None:
    chunk, config = transformer_engine_chunk()
    found = list(find_named_linears(chunk, config, 1, conventional_names))
    names = {fqn for linear in found for fqn in linear.fqns}
    attention = {f"model.layers.3.self_attn.{name}_proj" for name in "qkvo"}
    owners = ("3.mlp", "4.mlp.shared_experts", "4.mlp.experts.2", "4.mlp.experts.3")
    mlp = {f"model.layers.{owner}.{name}_proj" for owner in owners for name in ("gate", "up", "down")}
    assert names == attention | mlp
    qkv = found[0]
    x = torch.randn(3, 2, HIDDEN)
    blocks = [Block(projection(part.fqn, qkv.module.weight), part.rows) for part in qkv.parts]
    _, out_sq = watch(MegatronSite(qkv.module, blocks, "column"), x)
    z_TI = qkv.module.norm(x).reshape(-1, HIDDEN)
    groups = qkv.module.weight.reshape(GROUPS, HEADS // GROUPS + 2, 2, HIDDEN)
    parts = (groups[:, : HEADS // GROUPS], groups[:, -2], groups[:, -1])
    for found_T, weight in zip(out_sq, parts, strict=True):
        torch.testing.assert_close(found_T, local_sq_norm(z_TI @ weight.reshape(-1, HIDDEN).T))
