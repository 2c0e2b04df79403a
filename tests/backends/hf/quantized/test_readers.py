"""Quantised linears are scored by what their kernels multiply by, whoever quantised them."""

# T tokens, I in_features, O out_features

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plop_dist
from plop_dist.backends.hf.load import load_model
from plop_dist.config.schema import ModelConfig
from plop_dist.errors import ModelError
from plop_dist.measure.weight import Stored, find_weight
from tests.backends.hf.quantized.kinds import KINDS, load, save_plain
from tests.models import random_tokens, tiny

OFTEN = {"nf4-double", "int8", "torchao-int8-dynamic", "quanto-int8"}  # one of each package and each way to be read
NAMES = [name if name in OFTEN else pytest.param(name, marks=pytest.mark.rare) for name in KINDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_plain(tmp_path_factory.mktemp("plain"))


def observed(model: nn.Module, dense: dict[str, Tensor], samples: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return per linear the gains of its own output and of its dequantised weight, (T,) each, from plain hooks."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    handles = []
    for name, module in model.named_modules():
        if name in dense:

            def note(module: Any, args: tuple[Tensor, ...], y: Tensor, name: str = name) -> None:
                z_TI = args[0].detach().reshape(-1, args[0].shape[-1]).double()
                y_TO = y.detach().reshape(len(z_TI), -1).double()
                product_TO = z_TI @ dense[name].T
                found[name].append((y_TO.norm(dim=1) / z_TI.norm(dim=1), product_TO.norm(dim=1) / z_TI.norm(dim=1)))

            handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        for sample in samples:
            model(input_ids=sample)
    for handle in handles:
        handle.remove()
    return {name: tuple(torch.cat(parts) for parts in zip(*calls, strict=True)) for name, calls in found.items()}  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_gains_and_baselines_are_those_of_dequantised_weights(name: str, folder: Path) -> None:
    kind = KINDS[name]
    model = load_model(ModelConfig(name_or_path=str(folder), dtype="float32", quantization=kind.quantization))
    dense = {
        path: kind.dense(module).double().clone()
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    }
    samples = [random_tokens(1, length, seed=length) for length in (5, 9, 23)]
    scores = plop_dist.score(model, [{"input_ids": sample} for sample in samples], baseline="closed_form")
    assert {module.fqn for module in scores.modules} == set(dense)
    assert scores.left_out == ()
    expected = observed(model, dense, samples)
    for module in scores.modules:
        own, product = (float(gains.mean()) for gains in expected[module.fqn])
        assert module.gain == pytest.approx(own, rel=1e-4)
        if not kind.rounds:
            assert module.gain == pytest.approx(product, rel=1e-3)
        by_hand = dense[module.fqn].norm() / dense[module.fqn].shape[1] ** 0.5
        assert module.baseline == pytest.approx(float(by_hand), rel=1e-3)
    assert scores.model.num_parameters == sum(parameter.numel() for parameter in load(folder, None).parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_the_whole_weight_before_and_after_a_forward_pass(name: str, folder: Path) -> None:
    kind = KINDS[name]
    # By transformers alone: on some CPUs bitsandbytes then orders its bytes anew in the first forward pass.
    model: Any = load(folder, kind.quantization)
    module = model.model.layers[1].mlp.down_proj
    whole = kind.dense(module).float().clone()
    assert tuple(whole.shape) == find_weight(Stored(module)).shape
    for _ in range(2):
        weight = find_weight(Stored(module))
        assert torch.allclose(weight.dense().float(), whole, rtol=5e-3)
        rows = torch.cat([weight.read(start, min(start + 37, 256)) for start in range(0, 256, 37)])
        assert torch.equal(rows, weight.dense())
        with torch.no_grad():
            model(input_ids=random_tokens(1, 4))


def test_a_linear_that_multiplies_by_something_else_is_refused() -> None:
    class Ternary(nn.Linear):
        """Quantises its weight in every forward pass, and multiplies where nobody sees it."""

        def forward(self, z: Tensor) -> Tensor:
            scale = self.weight.abs().mean()
            return z @ ((self.weight / scale).round().clamp(-1, 1) * scale).T

    model: Any = tiny("llama")
    layer = model.model.layers[1].mlp
    odd = Ternary(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)
    odd.weight = layer.up_proj.weight
    layer.up_proj = odd
    with pytest.raises(ModelError, match=r"'model\.layers\.1\.mlp\.up_proj' \(Ternary\) returns something else than"):
        plop_dist.score(model, [{"input_ids": random_tokens(1, 7)}])
