"""Which keys NeMo-RL's example configuration has (release 0.7): what an override without a plus must find there.

Of examples/configs/grpo_math_1B.yaml, the sections that a launch of ours touches, by dotted key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_NAMES: Mapping[str, Any] = {
    "grpo": "num_prompts_per_step num_generations_per_prompt max_num_epochs max_num_steps seed val_period "
    "max_val_samples val_batch_size normalize_rewards use_leave_one_out_baseline",
    "loss_fn": "reference_policy_kl_penalty",
    "checkpointing": "enabled checkpoint_dir metric_name higher_is_better keep_top_k save_period",
    "data": {
        "": "max_input_seq_length shuffle validation",
        "train": "dataset_name split_validation_size seed",
        "default": "prompt_file system_prompt_file processor env_name",
    },
    "policy": {
        "": "model_name train_global_batch_size train_micro_batch_size max_total_sequence_length precision "
        "max_grad_norm scheduler",
        "tokenizer": "name chat_template_kwargs",
        "optimizer": {"": "name", "kwargs": "lr weight_decay betas eps"},
        "generation": {"": "backend max_new_tokens temperature", "vllm_cfg": "tensor_parallel_size precision"},
        "dtensor_cfg": {
            "": "enabled tensor_parallel_size",
            "lora_cfg": "enabled target_modules exclude_modules match_all_linear dim alpha dropout dropout_position "
            "lora_A_init use_triton",
        },
        "megatron_cfg": {
            "": "enabled tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size "
            "expert_model_parallel_size sequence_parallel",
            "peft": "enabled target_modules exclude_modules dim alpha dropout dropout_position",
            "optimizer": "lr min_lr weight_decay bf16 fp16",
            "scheduler": "lr_decay_style lr_decay_iters lr_warmup_iters lr_warmup_init",
        },
    },
    "logger": {
        "": "log_dir wandb_enabled tensorboard_enabled mlflow_enabled",
        "wandb": "project name",
        "mlflow": "experiment_name run_name",
    },
    "cluster": "gpus_per_node num_nodes",
}


def _keys(tree: Mapping[str, Any] | str, prefix: str = "") -> Iterator[str]:
    if isinstance(tree, str):
        yield from (f"{prefix}{name}" for name in tree.split())
        return
    for name, below in tree.items():
        yield from _keys(below, f"{prefix}{name}." if name else prefix)


EXAMPLE = frozenset(_keys(_NAMES))
