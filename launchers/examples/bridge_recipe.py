"""Megatron-Bridge: one line, an object for cfg.peft, here in the smallest loop, which a CPU runs as well.

    torchrun --nproc-per-node 2 launchers/examples/bridge_recipe.py [DIRECTORY]

Needs megatron-core and megatron-bridge; no download. The ranks cut the model by tensor parallelism. DIRECTORY gets the
base model and the adapter. In a recipe the line is `cfg.peft = ...`, and Bridge's finetune(cfg, forward_step) does what
stands below it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

import plop_dist
from plop_dist import MegatronBridgePeft  # before Bridge: it is what imports it where Transformer Engine is missing
from plop_dist.data.builtin import arithmetic_rows

# isort: split
from megatron.bridge import AutoBridge
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.pipeline_parallel import get_forward_backward_func

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
if torch.cuda.is_available():
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
directory = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/bridge")

# A tiny model with random weights, whose tokens are bytes. Your own instead: the name of any that Bridge knows.
tokenizer = ByT5Tokenizer()
if dist.get_rank() == 0:
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
        )
    ).save_pretrained(directory)  # fmt: skip
dist.barrier()

provider: Any = AutoBridge.from_hf_pretrained(directory).to_megatron_provider(load_weights=True)
provider.tensor_model_parallel_size = dist.get_world_size()
provider.gradient_accumulation_fusion = False
if not torch.cuda.is_available():  # Megatron's own layers, without fused kernels
    provider.transformer_layer_spec = lambda config, vp_stage=None: get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )
    provider.masked_softmax_fusion = provider.bias_activation_fusion = provider.bias_dropout_fusion = False
    provider.apply_rope_fusion = provider.persist_layer_norm = False
provider.finalize()
provider.initialize_model_parallel(seed=0)

texts = [f"{row['question']} {row['answer']}" for row in arithmetic_rows(seed=0, num_rows=96)]


def collate(texts: list[str]) -> dict[str, torch.Tensor]:
    """Return token ids and which of them are no padding."""
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt"))


batches = [collate(texts[start : start + 8]) for start in range(0, len(texts), 8)]

# The one line: cfg.peft. Bridge calls it with the loaded chunks, before it wraps them; see register_pre_wrap_hook.
peft = MegatronBridgePeft(batches=batches, k=3, num_samples=64, lora={"r": 8, "lora_alpha": 16})

provider.register_pre_wrap_hook(peft)
chunks = provider.provide_distributed_model(
    ddp_config=DistributedDataParallelConfig(), use_cpu_initialization=not torch.cuda.is_available()
)
trained = [parameter for chunk in chunks for parameter in chunk.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2)  # Megatron's own wants CUDA


def forward_step(source: Iterator[dict[str, torch.Tensor]], chunk: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    """Return the loss of each token, and what makes one of them: as Bridge's forward_step does."""
    ids, mask = (value.to(next(chunk.parameters()).device) for value in next(source).values())
    num_tokens = ids.shape[1]
    hidden = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=ids.device).triu(1)[None, None]
    positions = torch.arange(num_tokens, device=ids.device).expand_as(ids)
    losses = chunk(ids, positions, hidden, labels=ids.roll(-1, 1))

    def loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        is_target = mask[:, 1:].float()
        mean = (losses[:, :-1].float() * is_target).sum() / is_target.sum()
        return mean, {"loss": mean.detach()}

    return losses, loss


for step, batch in enumerate(batches, start=1):
    for chunk in chunks:
        chunk.zero_grad_buffer()
    (stored,) = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter([batch]), model=chunks, num_microbatches=1,
        seq_length=batch["input_ids"].shape[1], micro_batch_size=len(batch["input_ids"]), forward_only=False,
    )  # fmt: skip
    finalize_model_grads(chunks)
    for parameter in trained:
        parameter.grad = parameter.main_grad
    optimizer.step()
    optimizer.zero_grad()  # lets go of the buffer, which the next backward pass would count twice
    if dist.get_rank() == 0:
        print(f"step {step}: loss {stored['loss']:.3f}")

if dist.get_rank() == 0:
    print("LoRA on", ", ".join(peft.placement.module_types))
plop_dist.save_adapter(chunks, directory)
dist.destroy_process_group()
