"""FSDP2: three lines between fully_shard and the optimizer, and one that saves.

    torchrun --nproc-per-node 2 launchers/examples/fsdp2_loop.py [DIRECTORY]

Needs torch, transformers and peft; no download. DIRECTORY gets the adapter.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

import plop_dist
from plop_dist.data.builtin import arithmetic_rows

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
if torch.cuda.is_available():
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())

# A tiny model with random weights, whose tokens are bytes. Your own instead: AutoModelForCausalLM.from_pretrained(...)
torch.manual_seed(0)
tokenizer = ByT5Tokenizer()
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
    )
)  # fmt: skip
for part in (*model.model.layers, model):
    fully_shard(part)

texts = [f"{row['question']} {row['answer']}" for row in arithmetic_rows(seed=0, num_rows=256)]


def collate(texts: list[str]) -> dict[str, torch.Tensor]:
    """Return the model's inputs: padded, with labels that leave the padding out of the loss."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


sampler: DistributedSampler[str] = DistributedSampler(texts, shuffle=False)
loader = DataLoader(texts, batch_size=8, collate_fn=collate, sampler=sampler)

# The three lines: each rank scores its own share of the rows.
scores = plop_dist.score(model, loader, num_samples=64)
placement = plop_dist.place(scores, k=3)
model = placement.apply(model, r=8, lora_alpha=16)

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
device = next(iter(optimizer.param_groups[0]["params"])).device
model.train()
for step, batch in enumerate(loader, start=1):
    loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss:.3f}")

if dist.get_rank() == 0:
    print("LoRA on", ", ".join(placement.module_types))
plop_dist.save_adapter(model, sys.argv[1] if len(sys.argv) > 1 else "runs/examples/fsdp2")
dist.destroy_process_group()
