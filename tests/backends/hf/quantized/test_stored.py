"""Checkpoints that are stored quantised are scored as the dense model that their values stand for.

Their files are written here by hand, or by the quantiser's own package, and the dense model from the same values.
"""

# O out_features, I in_features

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import plop_dist
from plop_dist.backends.hf.load import load_model
from plop_dist.config.schema import ModelConfig
from plop_dist.measure.weight import read_weight
from tests.backends.hf.quantized.kinds import SIZES
from tests.models import random_tokens, save_tiny, tiny

pytestmark = pytest.mark.slow
RARE = pytest.mark.rare

BATCHES = [{"input_ids": random_tokens(1, length, seed=length)} for length in (5, 9, 23)]
Rewrite = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]


def rewrite(folder: Path, store: Rewrite, quantization: dict[str, Any]) -> dict[str, Tensor]:
    """Store the linears of a saved model in another form; returns all tensors as the dense model has them."""
    stored: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        new, dense[name] = ({name: tensor}, tensor) if "_proj" not in name else store(name, tensor)
        stored |= {key: value.contiguous() for key, value in new.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return dense


def assert_scored_as(folder: Path, dense: nn.Module, dtype: str = "float32") -> None:
    """Assert that the stored model's scores are the dense one's to 1e-3."""
    found = plop_dist.score(load_model(ModelConfig(name_or_path=str(folder), dtype=dtype)), BATCHES)  # type: ignore[arg-type]
    expected = plop_dist.score(dense, BATCHES)
    assert [(one.fqn, one.gain, one.baseline) for one in found.modules] == [
        (one.fqn, pytest.approx(one.gain, rel=1e-3), pytest.approx(one.baseline, rel=1e-3)) for one in expected.modules
    ]


def float8(block: tuple[int, int] | None) -> Rewrite:
    def store(name: str, weight_OI: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        size = block or tuple(weight_OI.shape)
        tiles = weight_OI.unflatten(1, (-1, size[1])).unflatten(0, (-1, size[0]))  # blocks, rows, blocks, columns
        scale = tiles.abs().amax((1, 3), keepdim=True) / 448
        rounded = (tiles / scale).to(torch.float8_e4m3fn)
        dense_OI = (rounded.float() * scale).reshape(weight_OI.shape)
        grid = scale[:, 0, :, 0] if block else scale.reshape(())
        return {name: rounded.reshape(weight_OI.shape), f"{name}_scale_inv": grid}, dense_OI

    return store


@pytest.mark.parametrize("block", [(128, 128), pytest.param(None, marks=RARE)])
def test_float8_by_blocks_and_by_tensor(block: tuple[int, int] | None, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, **SIZES)
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block and list(block)}
    values = rewrite(tmp_path, float8(block), quantization)
    dense = tiny("llama", **SIZES)
    dense.load_state_dict(values)
    assert_scored_as(tmp_path, dense)


@pytest.mark.parametrize("block", [(128, 128), None])
def test_float8_weights_are_read_where_kernels_multiply_by_them(block: tuple[int, int] | None) -> None:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    stored, dense_OI = float8(block)("weight", torch.randn(384, 256) * torch.randn(384, 1).exp())
    module: Any = FP8Linear(256, 384, block_size=block)
    module.weight.data, module.weight_scale_inv.data = stored["weight"], stored["weight_scale_inv"]
    assert torch.equal(read_weight(module), dense_OI)


def test_mxfp4_experts_are_those_that_their_nibbles_stand_for(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    save_tiny("gpt_oss", tmp_path, **sizes)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    generator = torch.Generator().manual_seed(0)

    def store(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        if ".experts." not in name or weight.dim() != 3:
            return {name: weight}, weight
        num_experts, num_in, num_out = weight.shape
        nibbles = torch.randint(16, (num_experts, num_out, num_in // 32, 32), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 124, nibbles.shape[:-1], generator=generator, dtype=torch.uint8)
        dense = values[nibbles.long()] * torch.exp2(scales.float() - 127)[..., None]
        packed = nibbles[..., ::2] | nibbles[..., 1::2] << 4
        return {f"{name}_blocks": packed, f"{name}_scales": scales}, dense.flatten(-2).transpose(1, 2).contiguous()

    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    tensors = rewrite(tmp_path, store, {"quant_method": "mxfp4", "modules_to_not_convert": skipped})
    dense = tiny("gpt_oss", **sizes)
    dense.load_state_dict(tensors)
    assert_scored_as(tmp_path, dense)


@pytest.mark.parametrize("scheme", ["W4A16", pytest.param("W8A8", marks=RARE), pytest.param("FP8_DYNAMIC", marks=RARE)])
def test_compressed_tensors_of_several_formats(scheme: str, tmp_path: Path) -> None:
    plain = save_tiny("llama", tmp_path / "plain", **SIZES)
    dense = compress(plain, tmp_path / "packed", scheme)
    found = plop_dist.score(load_model(ModelConfig(name_or_path=str(tmp_path / "packed"), dtype="float32")), BATCHES)
    expected = plop_dist.score(dense, BATCHES)
    rel = 1e-3 if scheme.endswith("A16") else 3e-2  # the others round activations, too
    assert [(one.fqn, one.gain, one.baseline) for one in found.modules] == [
        (one.fqn, pytest.approx(one.gain, rel=rel), pytest.approx(one.baseline, rel=1e-3)) for one in expected.modules
    ]


def compress(plain: Path, packed: Path, scheme: str) -> nn.Module:
    """Write a model compressed by its own package, channel by channel; returns the dense model of the same values."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(plain), dtype=torch.float32)
    groups = {"linears": preset_name_to_scheme(scheme, ["Linear"])}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    dense = tiny("llama", **SIZES)
    for name, module in model.named_modules():
        arguments = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if arguments is None:
            continue
        weight = module.weight.data
        size = arguments.group_size or weight.shape[1]
        tiles = weight.unflatten(1, (-1, size))
        scale, zero = calculate_qparams(tiles.amin(-1), tiles.amax(-1), arguments)
        module.weight_scale.data.copy_(scale)
        dense.get_submodule(name).weight.data = fake_quantize(weight, scale, zero, arguments)
    compressor: Any = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(packed)
    compressor.update_config(str(packed))
    return dense


@pytest.mark.parametrize("kind", ["online", pytest.param("offline", marks=RARE), "packed"])
def test_bitnet_is_scored_by_its_ternary_weights(kind: str) -> None:
    from transformers.integrations.bitnet import AutoBitLinear, BitLinear, pack_weights

    model, dense = tiny("llama", **SIZES), tiny("llama", **SIZES)
    for name, module in list(dense.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        scale = module.weight.data.abs().mean()
        ternary = (module.weight.data / scale).round().clamp(-1, 1)
        sizes = {"in_features": module.in_features, "out_features": module.out_features, "bias": False}
        new: Any = (
            BitLinear(**sizes, dtype=torch.float32)
            if kind == "packed"
            else AutoBitLinear(**sizes, online_quant=kind == "online")
        )
        if kind == "packed":
            new.weight, new.weight_scale = pack_weights(ternary.clone()), 1 / scale.reshape(1)
        elif kind == "offline":
            new.weight.data, new.weight_scale = ternary.clone(), scale.reshape(1)
        else:
            new.weight.data = module.weight.data.clone()
        module.weight.data = ternary * scale
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, new)
        # Where a sum was made in another order, a value half way between two may go to the other one.
        assert (read_weight(new) - module.weight.data).abs().gt(1e-6).float().mean() < 1e-3
    with torch.compiler.set_stance("force_eager"):
        found, expected = plop_dist.score(model, BATCHES), plop_dist.score(dense, BATCHES)
    assert [(one.fqn, one.gain, one.baseline) for one in found.modules] == [
        (one.fqn, pytest.approx(one.gain, rel=3e-2), pytest.approx(one.baseline, rel=1e-3)) for one in expected.modules
    ]
