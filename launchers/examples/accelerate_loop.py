"""accelerate: one line more than the script had before, in front of the optimizer and of prepare.

    python launchers/examples/accelerate_loop.py [DIRECTORY]
    torchrun --nproc-per-node 2 launchers/examples/accelerate_loop.py [DIRECTORY]

Needs accelerate and peft; no download. DIRECTORY gets the adapter.
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

import plop_dist
from plop_dist.data.builtin import arithmetic_rows

accelerator = Accelerator(cpu=not torch.cuda.is_available())

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


loader = DataLoader(texts, batch_size=8, collate_fn=collate)

# The one line: 64 rows of the loader, each rank its share, and all come to the same placement.
model = plop_dist.adapt_for_accelerate(accelerator, model, loader, k=3, num_samples=64, r=8, lora_alpha=16)

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
model.train()
for step, batch in enumerate(loader, start=1):
    loss = model(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"step {step}: loss {loss:.3f}")

directory = sys.argv[1] if len(sys.argv) > 1 else "runs/examples/accelerate"
accelerator.print("LoRA on", ", ".join(sorted(accelerator.unwrap_model(model).peft_config["default"].target_modules)))
plop_dist.save_adapter(model, directory)
accelerator.end_training()
