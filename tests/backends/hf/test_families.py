"""Families nobody tunes this package for: scores, token counts and PEFT adapters of each against float64 brute force.

A new family is one line of FAMILIES. The truth comes from the products that torch is asked for, not from hooks: every
F.linear with (a slice of) a parameter, in a float64 copy of the model that reads one sample at a time without padding.
"""

# T tokens, I in_features, O out_features

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, Gemma3Config

import plop_dist
from plop_dist.backends.hf.whole import whole_sites
from plop_dist.choose.candidates import find_candidates
from plop_dist.config.schema import PlacementConfig
from plop_dist.errors import ExportError, ModelError
from plop_dist.exporters.holders import hugging_face_targets
from plop_dist.measure.blocks import Block
from plop_dist.values.names import expert_index
from plop_dist.values.placement import Placement
from plop_dist.values.scores import ModuleScore, Scores
from tests.models import padded_batches, random_tokens, tiny
from tests.reference import Truth

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
MOE = {**LLAMA, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
BART = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
BERT = {**LLAMA, "is_decoder": True, "max_position_embeddings": 64, "type_vocab_size": 2}
LATENT = {**LLAMA, "num_key_value_heads": 4, "head_dim": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
          "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
          "topk_group": 1, "moe_intermediate_size": 16, "n_shared_experts": 1, "first_k_dense_replace": 1}  # fmt: skip

# Chosen for what is odd about them, named behind each line.
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},  # no width of its own, Conv1D, one type in two places
    "phi3": LLAMA,  # fused twice
    "opt": {**LLAMA, "ffn_dim": 48, "word_embed_proj_dim": 32},  # learned positions, told from the mask
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 24},  # a shared expert beside routed ones
    "deepseek_v3": LATENT,  # latent attention; a router with e_score_correction_bias
    "phimoe": {**LLAMA, "num_local_experts": 4},  # a router that is an nn.Linear and returns a tuple
    # a router whose tuple begins with scores; experts that get every token, most of them times 0
    "llama4_text": {**LLAMA, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},  # experts fed by sorted tokens
    "granitemoeshared": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
    "jetmoe": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2,
               "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},  # q and o of attention too
    "longcat_flash": {**LATENT, "num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "moe_topk": 2,
                      "zero_expert_num": 2, "routed_scaling_factor": 1.0},  # experts that hand tokens on
    "bart": BART,  # learned positions that know nothing of the mask
    "roberta": {**BERT, "vocab_size": 128},  # positions from 2 on
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48},  # no mask
    "falcon_mamba": {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4},  # out_proj
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48},  # ffn.0 and ffn.2
    "big_bird": {**BERT, "attention_type": "original_full"},  # a pooler
    "granitemoehybrid": {**LLAMA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 24,
                         "num_local_experts": 0, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
                         "mamba_expand": 2, "mamba_chunk_size": 16},  # gate and up fused as input_linear
}  # fmt: skip
LENGTHS = (9, 4, 6, 11, 3)
SAMPLES = [random_tokens(1, length, seed=length)[0] for length in LENGTHS]


class Products(TorchFunctionMode):
    """Keeps the products with rows of a parameter: {(parameter, offset): (weight (O, I), [z (T, I), ...])}."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._named = {p.untyped_storage().data_ptr(): (name, p) for name, p in model.named_parameters()}
        self.found: dict[tuple[str, int], tuple[Tensor, list[Tensor]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "linear":
            self._note(args[0], args[1])
        elif name == "addmm":  # Conv1D
            self._note(args[1], args[2].T)
        elif name == "bmm":  # Llama 4's experts: rows of 0 are tokens that they do not get
            for z_TI, weight_IO in zip(args[0], args[1], strict=True):
                self._note(z_TI[z_TI.any(dim=1)], weight_IO.T)
        return func(*args, **(kwargs or {}))

    def _note(self, z: Tensor, weight: Tensor) -> None:
        known = self._named.get(weight.untyped_storage().data_ptr())
        if known is not None:
            entry = self.found.setdefault((known[0], weight.storage_offset()), (weight.detach(), []))
            entry[1].append(z.detach().reshape(-1, z.shape[-1]))


@torch.no_grad()
def products_of(model: nn.Module, samples: Sequence[Tensor]) -> Products:
    exact: Any = copy.deepcopy(model).double()
    if hasattr(exact, "set_experts_implementation") and any(hasattr(m, "is_concatenated") for m in exact.modules()):
        exact.set_experts_implementation("eager")
    with Products(exact) as products:
        for sample in samples:
            exact(input_ids=sample[None], attention_mask=torch.ones_like(sample[None]))
    return products


def truth_of(module: ModuleScore, block: Block, model: nn.Module, products: Products) -> Truth | None:
    """Return what a projection does to all samples, or None where torch was asked for no such product."""
    expert = expert_index(module.fqn)
    key = (module.holder.removesuffix(".weight") + ".weight", 0)
    if expert is not None:
        key = (module.holder, expert * model.get_parameter(module.holder)[0].numel())
    if key not in products.found:
        return None
    weight, calls = products.found[key]
    rows_O = block.take_rows(torch.arange(len(weight))[:, None]).flatten()
    return Truth(torch.cat(calls), weight[rows_O])


def blocks_of(model: nn.Module) -> dict[str, Block]:
    return {block.projection.fqn: block for site in whole_sites(model, True) for block in cast(Any, site).blocks}


def sampled_baseline(weight_OI: Tensor) -> float:
    """Return E||Wu|| by 20,000 directions in float64."""
    generator = torch.Generator().manual_seed(1)
    u_KI = torch.randn(20_000, weight_OI.shape[1], dtype=torch.float64, generator=generator)
    return float(((u_KI / u_KI.norm(dim=1, keepdim=True)) @ weight_OI.double().T).norm(dim=1).mean())


# The fast lane takes those that differ most; each of these costs about a second.
SLOW = ("gemma3_text", "phi3", "opt", "longcat_flash", "jetmoe", "falcon_mamba", "granitemoeshared", "big_bird", "bart")


def batches(side: str) -> list[dict[str, Tensor]]:
    """Return the samples two a batch, padded on this side."""
    return padded_batches(SAMPLES, side)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FAMILIES]
)
def test_scores_equal_brute_force_and_reach_peft(family: str) -> None:
    model = tiny(family, **FAMILIES[family])
    products = products_of(model, SAMPLES)
    scores = {side: plop_dist.score(model, batches(side), baseline="exact") for side in ("right", "left")}
    blocks = blocks_of(model)
    compared: set[str] = set()
    for module in scores["right"].modules:
        truth = truth_of(module, blocks[module.fqn], model, products)
        if truth is None:  # DeepSeek-V3's router multiplies with a float32 copy of its weight
            assert module.storage == "router"
            continue
        assert truth.weight_OI.shape == (module.out_features, module.in_features)
        if expert_index(module.fqn) is None:
            assert module.baseline == pytest.approx(sampled_baseline(truth.weight_OI), rel=0.02)
        gain = pytest.approx(float(truth.gains.mean()), rel=1e-4)
        for side in scores:
            (found,) = (one for one in scores[side].modules if one.fqn == module.fqn)
            assert (found.num_tokens, found.gain) == (len(truth.z_TI), gain), (module.fqn, side)
        compared.add(module.holder.removesuffix(".weight"))
    silent = {entry.holder.removesuffix(".weight") for entry in scores["right"].left_out}
    heads = ("lm_head", "head", "cls.predictions.decoder", "lm_head.decoder")
    missed = {name.removesuffix(".weight") for name, _ in products.found} - compared - silent - set(heads)
    assert not missed
    assert_peft_adapts_exactly(model, scores["right"])


def assert_peft_adapts_exactly(model: nn.Module, scores: Scores) -> None:
    """The lowest three types, then all that PEFT takes: names, number of parameters, and a forward pass."""
    for k in (3, len(scores.types)):
        placement = placed(scores, k)
        adapted: Any = get_peft_model(copy.deepcopy(model), placement.to_peft())
        holders = {holder.peft_path.rpartition(".")[0] if holder.is_parameter else holder.path
                   for holder in hugging_face_targets(placement, "peft", False).holders}  # fmt: skip
        names = [name for name, _ in adapted.named_parameters() if ".lora_A" in name]
        found = {
            name.removeprefix("base_model.model.").partition(".lora_A")[0].replace(".base_layer", "") for name in names
        }
        assert found == holders
        assert adapted.get_nb_trainable_parameters()[0] == placement.num_trainable_parameters
        adapted(input_ids=random_tokens(1, 5))


def placed(scores: Scores, k: int) -> Placement:
    """Return the placement of the k lowest types, less what PEFT refuses, as its error says to."""
    exclude = ["lm_head"]
    while True:
        candidates = find_candidates(scores.modules, PlacementConfig(exclude=exclude), scores.left_out).units
        placement = plop_dist.place(scores, k=min(k, len(candidates)), exclude=exclude)
        try:
            placement.to_peft()
        except ExportError as error:
            exclude += str(error).rpartition("placement.exclude=[")[2].partition("]")[0].split(",")
        else:
            return placement


def test_a_grouped_linear_is_left_out() -> None:
    class Grouped(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # DeepSeek-V4's o_a_proj: each part of z meets its own rows of W
            return torch.einsum("bsgi,goi->bsgo", input, self.weight.view(2, -1, 16))

    model: Any = tiny("llama", hidden_size=32)
    mlp = model.model.layers[0].mlp
    mlp.extra = Grouped(16, 8, bias=False)
    mlp.register_forward_pre_hook(
        lambda module, args: (args[0] + 0 * module.extra(args[0].unflatten(-1, (2, 16))).sum(),)
    )
    scores = plop_dist.score(model, batches("right"))
    assert [(entry.type, entry.reason) for entry in scores.left_out] == [("extra", "not_per_token")]
    assert {module.num_tokens for module in scores.modules} == {sum(LENGTHS)}


def test_a_multimodal_model_is_scored_where_text_goes() -> None:
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
              "num_attention_heads": 4, "image_size": 28, "patch_size": 14}  # fmt: skip
    text = {**LLAMA, "vocab_size": 128, "pad_token_id": 0}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    scores = plop_dist.score(model, batches("left"))
    assert all(module.fqn.startswith("model.language_model.") for module in scores.modules)
    assert {entry.reason for entry in scores.left_out} == {"no_tokens"}
    assert "model.vision_tower.encoder.layers.0.self_attn.q_proj" in {entry.fqn for entry in scores.left_out}
    placement = plop_dist.place(scores, k=len(scores.types))
    adapted: Any = get_peft_model(copy.deepcopy(model), placement.to_peft())
    assert not any("vision_tower" in name for name, _ in adapted.named_parameters() if "lora_" in name)
    assert adapted.get_nb_trainable_parameters()[0] == placement.num_trainable_parameters


def test_an_encoder_decoder_model_is_refused() -> None:
    config = BartConfig(**BART, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=48, vocab_size=128)
    with pytest.raises(ModelError, match="BartForConditionalGeneration is an encoder-decoder model"):
        plop_dist.score(BartForConditionalGeneration(config), batches("right"))


def test_double_precision_models_are_scored() -> None:
    model = tiny("llama")
    single, double = (plop_dist.score(one, batches("right")) for one in (model, copy.deepcopy(model).double()))
    assert [module.gain for module in double.modules] == pytest.approx([m.gain for m in single.modules], rel=1e-5)


def test_a_hosts_autocast_and_default_dtype_change_no_baseline() -> None:
    model = tiny("llama")
    expected = {module.fqn: module.baseline for module in plop_dist.score(model, batches("right")).modules}
    with torch.autocast("cpu", torch.bfloat16):
        found = plop_dist.score(model, batches("right"))
    assert {module.fqn: module.baseline for module in found.modules} == expected
    try:
        torch.set_default_dtype(torch.float64)
        found = plop_dist.score(model, batches("right"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {module.fqn: module.baseline for module in found.modules} == pytest.approx(expected, rel=1e-6)
