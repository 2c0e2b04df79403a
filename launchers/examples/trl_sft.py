"""TRL's SFTTrainer with adapters where PLoP puts them: one line more, the rest stays as it was.

    python launchers/examples/trl_sft.py [DIRECTORY]
    torchrun --nproc-per-node 2 launchers/examples/trl_sft.py [DIRECTORY]

Needs trl, peft and datasets; about half a minute on a CPU, no download. DIRECTORY gets the checkpoints and the adapter.
"""

from __future__ import annotations

import sys

import torch
from datasets import Dataset
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

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
        num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )
)  # fmt: skip

# Word problems made up on the spot. Your own instead, with a column `text`:
# dataset = load_dataset("json", data_files="rows.jsonl", split="train")
rows = arithmetic_rows(seed=0, num_rows=128)
dataset = Dataset.from_list([{"text": f"{row['question']} {row['answer']}"} for row in rows])

directory = sys.argv[1] if len(sys.argv) > 1 else "runs/examples/trl_sft"
arguments = SFTConfig(
    output_dir=directory, max_steps=12, per_device_train_batch_size=8, learning_rate=1e-2, max_length=256,
    logging_steps=1, save_strategy="no", report_to="none", use_cpu=not torch.cuda.is_available(), bf16=False,
)  # fmt: skip


trainer = SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)

# The one line: 64 of the trainer's own rows, each rank its share, and all come to the same placement.
placement = plop_dist.attach(trainer, k=3, num_samples=64, r=8, lora_alpha=16)
print("LoRA on", ", ".join(placement.module_types))

trainer.train()
trainer.save_model(directory)
print(f"The adapter lies in {directory}; PeftModel.from_pretrained(base, {directory!r}) loads it.")
