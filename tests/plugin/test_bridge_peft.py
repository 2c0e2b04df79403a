"""cfg.peft of a Megatron-Bridge recipe: called as Bridge's setup calls it, between loading and wrapping."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import plop_dist
from plop_dist.errors import ConfigError
from tests.installed import needs_bridge
from tests.models import random_tokens, save_tiny
from tests.plugin.hosts import load, train_in_one_process
from tests.spawn import run_ranks

NUM_STEPS = 3
LEARNING_RATE = 0.03


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": random_tokens(2, 9, seed=99)}]


def _job(rank: int, directory: Path, folder: Path) -> Any:
    from plop_dist.backends.megatron.backend import load_chunks
    from tests.backends.megatron.models import config

    chunks, _ = load_chunks(config(directory, tp=2))
    peft = plop_dist.MegatronBridgePeft(batches=batches, k=3, lora={"r": 4, "lora_alpha": 8})
    with pytest.raises(ConfigError, match="adapts a whole model at once, not 'linear_qkv' by itself"):
        peft.transform(chunks[0], "linear_qkv")
    assert peft.to_cfg_dict()["_target_"] == "plop_dist.plugin.bridge_peft.MegatronBridgePeft"
    adapted = peft(chunks, training=True)
    peft.set_params_to_save(adapted)
    trained = {name for name, parameter in adapted[0].named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".adapter." in name for name in trained)
    assert trained == peft.params_to_save
    assert adapted[0].training
    plop_dist.save_adapter(adapted, folder)
    assert peft.placement is not None
    return peft.placement.modules, peft.to_cfg_dict()


@needs_bridge
@pytest.mark.slow
def test_bridge_gets_what_the_model_in_one_process_would(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    (modules, written), (others, _) = run_ranks(2, _job, tmp_path / "model", tmp_path / "adapter")
    expected = plop_dist.place(plop_dist.score(load(tmp_path / "model"), batches()), k=3)
    assert modules == others == expected.modules
    assert written["_target_"] == "plop_dist.canonical_lora.CanonicalLoRA"
    assert (written["dim"], written["alpha"]) == (4, 8)
    held: Any = PeftModel.from_pretrained(load(tmp_path / "model"), str(tmp_path / "adapter"))
    assert {path for path, module in held.named_modules() if hasattr(module, "lora_A")} == {
        f"base_model.model.{fqn}" for fqn in modules
    }


def rows(step: int) -> Tensor:
    """Return the joined batch of a step, two rows."""
    return random_tokens(2, 9, seed=step)


def provider_of(directory: Path, tp: int) -> Any:
    """Return Bridge's provider of a model, as a recipe has it, with layers that a CPU can run."""
    from plop_dist.backends.megatron.bridge import import_auto_bridge

    auto_bridge = import_auto_bridge()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    provider: Any = auto_bridge.from_hf_pretrained(directory).to_megatron_provider(load_weights=True)
    provider.tensor_model_parallel_size = tp
    provider.transformer_layer_spec = lambda config, vp_stage=None: get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )
    for name in ("masked_softmax_fusion", "bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion"):
        setattr(provider, name, False)
    provider.gradient_accumulation_fusion = provider.persist_layer_norm = False
    provider.cross_entropy_loss_fusion = False  # it rounds the gradient of the logits to bfloat16
    provider.attention_dropout = provider.hidden_dropout = 0.0
    provider.params_dtype = torch.float32
    provider.bf16 = False
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    return provider


def _train(rank: int, directory: Path, folder: Path, tp: int) -> list[float]:
    provider = provider_of(directory, tp)
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    torch.manual_seed(7 + rank)
    peft = plop_dist.MegatronBridgePeft(batches=batches, k=3, lora={"r": 4, "lora_alpha": 16})
    provider.register_pre_wrap_hook(peft)
    chunks = provider.provide_distributed_model(ddp_config=DistributedDataParallelConfig(), use_cpu_initialization=True)
    assert [type(chunk).__name__ for chunk in chunks] == ["DistributedDataParallel"]
    plop_dist.save_adapter(chunks, folder / "start")
    mine = slice(None) if tp == 2 else slice(rank, rank + 1)

    def forward_step(source: Iterator[Tensor], chunk: Any) -> Any:
        tokens = next(source)
        hidden, places = torch.ones(9, 9, dtype=torch.bool).triu(1)[None, None], torch.arange(9).expand_as(tokens)
        losses = chunk(tokens, places, hidden, labels=tokens.roll(-1, 1))
        return losses, lambda losses: (losses[:, :-1].mean(), {"loss": losses[:, :-1].mean().detach()})

    trained = [parameter for parameter in chunks[0].parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.SGD(trained, lr=LEARNING_RATE), []
    for step in range(NUM_STEPS):
        chunks[0].zero_grad_buffer()
        tokens = rows(step)[mine]
        (stored,) = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter([tokens]), model=chunks, num_microbatches=1,
            seq_length=9, micro_batch_size=len(tokens), forward_only=False,
        )  # fmt: skip
        finalize_model_grads(chunks)
        for parameter in trained:
            parameter.grad = parameter.main_grad
        optimizer.step()
        optimizer.zero_grad()  # else the next backward pass adds what it finds here to the buffer that it is part of
        losses.append(stored["loss"])
    plop_dist.save_adapter(chunks, folder / "two")
    means = torch.stack(losses)
    dist.all_reduce(means)
    return (means / 2).tolist()


@needs_bridge
@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_two_ranks_train_like_one_process(tmp_path: Path, tp: int) -> None:
    directory = save_tiny("llama", tmp_path / "model")
    first, second = run_ranks(2, _train, directory, tmp_path, tp)
    assert first == second
    base: Any = load(directory, attention_dropout=0.0)
    model: Any = PeftModel.from_pretrained(base, str(tmp_path / "start"), is_trainable=True)
    expected = train_in_one_process(model, [rows(step) for step in range(NUM_STEPS)], LEARNING_RATE)
    assert first == pytest.approx(expected, rel=1e-5)
    model.save_pretrained(str(tmp_path / "one"))
    start, found, wanted = (
        load_file(tmp_path / part / "adapter_model.safetensors") for part in ("start", "two", "one")
    )
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        assert float((value - wanted[key]).abs().max()) < 1e-5, key
    assert any(not torch.equal(value, start[key]) for key, value in found.items()), "nothing was trained"
