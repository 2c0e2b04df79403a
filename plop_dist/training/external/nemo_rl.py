"""What NeMo-RL is handed for GRPO: jsonl rows, and overrides of its example configurations."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plop_dist.checkpoints.builtin import resolve
from plop_dist.config.schema import Config
from plop_dist.data.texts import Row
from plop_dist.training.external.handover import (
    HandedOver,
    completions_per_step,
    megatron_sizes,
    prompts_per_step,
)
from plop_dist.values.files import write_text


class NeMoRL:
    """examples/run_grpo.py of NeMo-RL's repository (no part of its package), with DTensor or Megatron."""

    name = "nemo-rl"
    note = "It runs in NeMo-RL's repository. Its math environment rewards; train.rewards does not reach it."

    def home(self) -> Path | None:
        """Return the repository whose package is installed. See ExternalEngine."""
        found = importlib.util.find_spec("nemo_rl")
        folders = found.submodule_search_locations if found is not None else None
        repositories = [Path(folder).parent for folder in folders or ()]
        return next((path for path in repositories if (path / "examples" / "run_grpo.py").is_file()), None)

    def write_rows(
        self, directory: Path, split: str, rows: Sequence[Row], prompts: Sequence[str], config: Config
    ) -> None:
        """Write SPLIT.jsonl. See ExternalEngine."""
        field = config.train.answer_field
        pairs = zip(prompts, rows, strict=True)
        lines = [json.dumps({"input": prompt, "output": str(row[field])}) for prompt, row in pairs]
        write_text(directory / f"{split}.jsonl", "\n".join(lines) + "\n")

    def launch(self, config: Config, directory: Path, is_megatron: bool) -> tuple[list[str], dict[str, Any]]:
        """Return the command and its overrides. See ExternalEngine."""
        train, parallel = config.train, config.parallel
        fields: dict[str, Any] = {
            "grpo.num_prompts_per_step": prompts_per_step(config),
            "grpo.num_generations_per_prompt": train.num_generations,
            "grpo.max_num_steps": train.max_steps,
            "grpo.seed": train.seed,
            "policy.model_name": resolve(config.model.name_or_path),
            "policy.train_global_batch_size": completions_per_step(config),
            "policy.train_micro_batch_size": train.micro_batch_size,
            "policy.max_total_sequence_length": train.max_length + train.max_completion_length,
            "policy.max_grad_norm": train.max_grad_norm,
            "policy.generation.temperature": train.temperature,
            "policy.generation.vllm_cfg.tensor_parallel_size": parallel.tp,
            "data.dataset_name": "ResponseDataset",
            "+data.train_data_path": str(directory / "train.jsonl"),
            "+data.val_data_path": str(directory / "held_out.jsonl"),
            "checkpointing.checkpoint_dir": str(directory / "checkpoints"),
            "logger.log_dir": str(directory / "logs"),
            "cluster.gpus_per_node": parallel.world_size,
            "cluster.num_nodes": 1,
        }
        base = "grpo_math_1B_megatron.yaml" if is_megatron else "grpo_math_1B.yaml"
        if is_megatron:
            fields["policy.megatron_cfg.optimizer.lr"] = train.learning_rate
            fields["policy.megatron_cfg.sequence_parallel"] = parallel.sequence_parallel
            fields |= {f"policy.megatron_cfg.{key}": size for key, size in megatron_sizes(config).items()}
        else:
            fields["policy.optimizer.kwargs.lr"] = train.learning_rate
        return ["uv", "run", "examples/run_grpo.py", "--config", f"examples/configs/{base}"], fields


ENGINE = HandedOver(NeMoRL())
