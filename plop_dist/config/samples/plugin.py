"""A plain PyTorch loop: score the model on its own batches, place the adapters, train them.

    python THIS_FILE [DIRECTORY]

Needs torch, transformers and peft; about half a minute on a CPU, no download. DIRECTORY gets the adapter.
"""

from __future__ import annotations

import sys

import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

import plop_dist
from plop_dist.data.builtin import arithmetic_rows

# A tiny model with random weights, whose tokens are bytes. Your own instead:
# tokenizer = AutoTokenizer.from_pretrained("meta-llama/Llama-3.2-1B")
# model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")
torch.manual_seed(0)
tokenizer = ByT5Tokenizer()
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
    )
)  # fmt: skip

# Word problems made up on the spot. Your own instead: any list of texts, e.g. a column of a data set.
# texts = load_dataset("openai/gsm8k", "main", split="train")["question"]
texts = [f"{row['question']} {row['answer']}" for row in arithmetic_rows(seed=0, num_rows=128)]


def collate(texts: list[str]) -> dict[str, torch.Tensor]:
    """Return the model's inputs: padded, with labels that leave the padding out of the loss."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


# Your own instead: a DataLoader of any kind, whose batches are dictionaries of the model's inputs.
batches = [collate(texts[start : start + 8]) for start in range(0, len(texts), 8)]

# 64 samples are enough to choose by; each token counts once, padding does not.
scores = plop_dist.score(model, batches[:8])
placement = plop_dist.place(scores, k=3)
for entry in scores.types:
    print(f"{entry.type:10} NFN {entry.nfn:.3f}{'  <- adapted' if entry.type in placement.module_types else ''}")

model = placement.apply(model, r=8, lora_alpha=16)
model.print_trainable_parameters()

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
model.train()
for step, batch in enumerate(batches, start=1):
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss:.3f}")

directory = sys.argv[1] if len(sys.argv) > 1 else "runs/examples/plugin"
plop_dist.save_adapter(model, directory)
print(f"The adapter lies in {directory}; PeftModel.from_pretrained(base, {directory!r}) loads it.")
