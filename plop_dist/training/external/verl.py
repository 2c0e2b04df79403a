"""What verl is handed for GRPO: parquet rows with our rewards beside them, and overrides of main_ppo."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plop_dist.checkpoints.builtin import resolve
from plop_dist.config.schema import Config
from plop_dist.data.texts import Row
from plop_dist.training import rewards
from plop_dist.training.external.handover import HandedOver, megatron_sizes, prompts_per_step
from plop_dist.values.files import write_bytes

_ACTOR, _ROLLOUT, _REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"


class Verl:
    """verl.trainer.main_ppo, with FSDP or Megatron, generating with vLLM; rewards.compute_score rates completions."""

    name = "verl"
    note = ""

    def home(self) -> Path | None:
        """Return the current directory where verl is installed. See ExternalEngine."""
        return None if importlib.util.find_spec("verl") is None else Path.cwd()

    def write_rows(
        self, directory: Path, split: str, rows: Sequence[Row], prompts: Sequence[str], config: Config
    ) -> None:
        """Write SPLIT.parquet. See ExternalEngine."""
        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()
        train = config.train
        entries = [
            {
                "data_source": config.references.get("data.path", config.data.path),
                "prompt": [{"role": "user", "content": prompt}],
                "reward_model": {"style": "rule", "ground_truth": str(row[train.answer_field])},
                "extra_info": {
                    "rewards": list(train.rewards),
                    "answer_field": train.answer_field,
                    "row": json.dumps(row, default=str),
                },
            }
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        content = io.BytesIO()
        Dataset.from_list(entries).to_parquet(content)
        write_bytes(directory / f"{split}.parquet", content.getvalue())

    def launch(self, config: Config, directory: Path, is_megatron: bool) -> tuple[list[str], dict[str, Any]]:
        """Return the command and its overrides. See ExternalEngine."""
        train, parallel = config.train, config.parallel
        fields: dict[str, Any] = {
            "algorithm.adv_estimator": "grpo",
            "data.train_files": str(directory / "train.parquet"),
            "data.val_files": str(directory / "held_out.parquet"),
            "data.train_batch_size": prompts_per_step(config),
            "data.max_prompt_length": train.max_length,
            "data.max_response_length": train.max_completion_length,
            "reward.custom_reward_function.path": str(Path(rewards.__file__)),
            "reward.custom_reward_function.name": rewards.compute_score.__name__,
            "actor_rollout_ref.model.path": resolve(config.model.name_or_path),
            f"{_ACTOR}.optim.lr": train.learning_rate,
            f"{_ACTOR}.ppo_mini_batch_size": prompts_per_step(config),
            f"{_ACTOR}.ppo_micro_batch_size_per_gpu": train.micro_batch_size,
            f"{_ROLLOUT}.name": "vllm",
            f"{_ROLLOUT}.n": train.num_generations,
            f"{_ROLLOUT}.temperature": train.temperature,
            f"{_ROLLOUT}.tensor_model_parallel_size": parallel.tp,
            f"{_ROLLOUT}.log_prob_micro_batch_size_per_gpu": train.micro_batch_size,
            f"{_REF}.log_prob_micro_batch_size_per_gpu": train.micro_batch_size,
            "trainer.total_training_steps": train.max_steps,
            "trainer.n_gpus_per_node": parallel.world_size,
            "trainer.nnodes": 1,
            "trainer.save_freq": train.save_steps,
            "trainer.default_local_dir": str(directory / "checkpoints"),
            "trainer.project_name": "plop-dist",
            "trainer.experiment_name": config.run_path.name,
        }
        command = ["python3", "-m", "verl.trainer.main_ppo"]
        if is_megatron:
            command.append("--config-name=ppo_megatron_trainer")
            fields |= {f"{_ACTOR}.megatron.use_mbridge": True, f"{_ACTOR}.megatron.vanilla_mbridge": False}
            for role in (_ACTOR, _REF):
                fields |= {f"{role}.megatron.{key}": size for key, size in megatron_sizes(config).items()}
        return command, fields


ENGINE = HandedOver(Verl())
