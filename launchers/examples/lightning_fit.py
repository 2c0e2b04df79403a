"""Lightning: one callback more for the Trainer, and one line that saves.

    python launchers/examples/lightning_fit.py [DIRECTORY]
    torchrun --nproc-per-node 2 launchers/examples/lightning_fit.py [DIRECTORY]

Needs lightning, transformers and peft; no download. DIRECTORY gets the adapter.
"""

from __future__ import annotations

import os
import sys

import lightning.pytorch as lightning
import torch
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

import plop_dist
from plop_dist.data.builtin import arithmetic_rows

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


class Module(lightning.LightningModule):
    """A language model as Lightning trains it."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        """Return the loss of a batch."""
        loss = self.model(**batch).loss
        self.print(f"step {index + 1}: loss {loss:.3f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over what requires gradients."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


# The one line: 64 of the trainer's own rows, each rank its share, before the strategy wraps the model.
callback = plop_dist.lightning_callback(k=3, num_samples=64, r=8, lora_alpha=16)

world_size = int(os.environ.get("WORLD_SIZE", "1"))
trainer = lightning.Trainer(
    callbacks=[callback], max_epochs=1, accelerator="auto" if torch.cuda.is_available() else "cpu", devices=world_size,
    logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
module = Module(model)
trainer.fit(module, DataLoader(texts, batch_size=8, collate_fn=collate))

if trainer.is_global_zero:
    print("LoRA on", ", ".join(callback.placement.module_types))
plop_dist.save_adapter(module.model, sys.argv[1] if len(sys.argv) > 1 else "runs/examples/lightning")
