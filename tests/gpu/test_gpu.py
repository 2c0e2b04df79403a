"""On a CUDA device the scores are those of the CPU, and the model comes back as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import plop_dist
from plop_dist.backends.hf.load import load_model
from plop_dist.config.schema import ModelConfig
from tests.backends.hf.quantized.kinds import KINDS, save_plain
from tests.backends.hf.quantized.test_readers import observed
from tests.models import random_tokens, tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "qwen3_moe"])
def test_scores_on_the_gpu_are_those_of_the_cpu(family: str) -> None:
    tokens, mask = random_tokens(3, 24), torch.ones(3, 24, dtype=torch.int64)
    mask[1, 15:] = mask[2, :4] = 0
    batches = [{"input_ids": tokens, "attention_mask": mask}]
    expected = plop_dist.score(tiny(family), batches)
    model = tiny(family).cuda()
    before = torch.cuda.get_rng_state()
    found = plop_dist.score(model, batches)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    for one, other in zip(found.modules, expected.modules, strict=True):
        assert (one.fqn, one.num_tokens) == (other.fqn, other.num_tokens)
        assert (one.gain, one.baseline) == pytest.approx((other.gain, other.baseline), rel=1e-4), one.fqn


@pytest.mark.parametrize("name", KINDS)
def test_quantised_linears_are_scored_by_what_their_kernels_multiply_by(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    pytest.importorskip({"nf4": "bitsandbytes", "fp4": "bitsandbytes", "int8": "bitsandbytes", "torchao": "torchao",
                         "quanto": "optimum.quanto"}[name.split("-")[0]])  # fmt: skip
    model = load_model(
        ModelConfig(name_or_path=str(save_plain(tmp_path)), dtype="float32", quantization=kind.quantization)
    )
    model = model.to("cuda")
    dense = {
        path: kind.dense(module).double().clone()
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    }
    samples = [random_tokens(1, length, seed=length).cuda() for length in (5, 9, 23)]
    scores = plop_dist.score(model, [{"input_ids": sample} for sample in samples], baseline="closed_form")
    assert {module.fqn for module in scores.modules} == set(dense)
    expected = observed(model, dense, samples)
    for module in scores.modules:
        own, product = (float(gains.mean()) for gains in expected[module.fqn])
        assert module.gain == pytest.approx(own, rel=1e-4), module.fqn
        if not kind.rounds:
            assert module.gain == pytest.approx(product, rel=1e-3), module.fqn
        by_hand = dense[module.fqn].norm() / dense[module.fqn].shape[1] ** 0.5
        assert module.baseline == pytest.approx(float(by_hand), rel=1e-3), module.fqn
