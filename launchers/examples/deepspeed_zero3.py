"""DeepSpeed: three lines behind deepspeed.initialize, here an engine of ZeRO-3, and one that saves.

    torchrun --nproc-per-node 2 launchers/examples/deepspeed_zero3.py [DIRECTORY]

Needs deepspeed, transformers and peft; no download. DIRECTORY gets the adapter.
"""

from __future__ import annotations

import sys

import deepspeed
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

import plop_dist
from plop_dist.data.builtin import arithmetic_rows

deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")

# A tiny model with random weights, whose tokens are bytes. Your own instead: AutoModelForCausalLM.from_pretrained(...)
torch.manual_seed(0)
tokenizer = ByT5Tokenizer()
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
    )
)  # fmt: skip

texts = [f"{row['question']} {row['answer']}" for row in arithmetic_rows(seed=0, num_rows=256)]


def collate(texts: list[str]) -> dict[str, torch.Tensor]:
    """Return the model's inputs: padded, with labels that leave the padding out of the loss."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


sampler: DistributedSampler[str] = DistributedSampler(texts, shuffle=False)
loader = DataLoader(texts, batch_size=8, collate_fn=collate, sampler=sampler)

config = {
    "train_micro_batch_size_per_gpu": 8,
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

# The three lines: each rank scores its own share of the rows; the new engine has the old one's configuration.
scores = plop_dist.score(engine, loader, num_samples=64)
placement = plop_dist.place(scores, k=3)
engine = placement.apply(engine, r=8, lora_alpha=16)

engine.train()
for step, batch in enumerate(loader, start=1):
    loss = engine(**{name: tensor.to(engine.device) for name, tensor in batch.items()}).loss
    engine.backward(loss)
    engine.step()
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss:.3f}")

if dist.get_rank() == 0:
    print("LoRA on", ", ".join(placement.module_types))
plop_dist.save_adapter(engine, sys.argv[1] if len(sys.argv) > 1 else "runs/examples/deepspeed")
engine.destroy()
dist.destroy_process_group()
