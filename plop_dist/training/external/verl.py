"""What verl is handed for GRPO: parquet rows with our rewards beside them, and overrides of main_ppo."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plop_dist.checkpoints.builtin import resolve
from plop_dist.config.schema import Config
from plop_dist.data.texts import Row
from plop_dist.training import rewards
from plop_dist.training.external.handover import (
    Brought,
    HandedOver,
    Launch,
    generation_tp,
    megatron_sizes,
    prompts_per_step,
    python_of,
)
from plop_dist.training.external.interpreter import Interpreter
from plop_dist.training.external.left import latest_folder, logged_steps
from plop_dist.training.external.nodes import nodes_of
from plop_dist.training.external.prompts import Prompts
from plop_dist.training.external.train_keys import refuse
from plop_dist.values.files import write_bytes

_MODEL = "actor_rollout_ref.model"
_ACTOR, _ROLLOUT, _REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_COLUMNS = {"reward": "critic/score/mean", "loss": "actor/pg_loss", "grad_norm": "actor/grad_norm",
            "learning_rate": "actor/lr"}  # fmt: skip


class Verl:
    """verl.trainer.main_ppo, with FSDP or Megatron, generating with vLLM; rewards.compute_score rates completions."""

    name = "verl"
    note = ""
    packages: tuple[str, ...] = ("verl", "ray", "vllm", "plop_dist")
    trusts_all = False
    reasons: Mapping[str, str] = {"lora_dropout": "its FSDP engine builds PEFT's LoRA without dropout"}

    def takes(self, is_megatron: bool) -> frozenset[str]:
        """Return the keys of `train` for which it has a word."""
        keys = {
            "max_steps", "learning_rate", "lr_scheduler", "warmup_steps", "weight_decay", "max_grad_norm",
            "micro_batch_size", "gradient_accumulation_steps", "max_length", "save_steps", "seed", "rewards",
            "num_generations", "max_completion_length", "temperature", "loggers",
        }  # fmt: skip
        return frozenset(keys | {"lora_dropout"}) if is_megatron else frozenset(keys)

    def check(self, config: Config, is_megatron: bool) -> None:
        """Raise ConfigError for a schedule or a dtype it has no word for."""
        if not is_megatron and config.train.lr_scheduler == "linear":
            refuse(
                config, self.name, "train.lr_scheduler", "has constant and cosine alone with FSDP; take one of these"
            )
        if is_megatron and config.model.dtype == "float32":
            refuse(config, self.name, "model.dtype", "computes in bfloat16 or float16 with Megatron; take one of these")

    def home(self, interpreter: Interpreter) -> Path | None:
        """Return the current directory. See ExternalEngine."""
        del interpreter
        return Path.cwd()

    def write_rows(self, directory: Path, split: str, rows: Sequence[Row], prompts: Prompts, config: Config) -> None:
        """Write SPLIT.parquet. See ExternalEngine."""
        entries = [
            {
                "data_source": config.references.get("data.path", config.data.path),
                "prompt": chat,
                "reward_model": {"style": "rule", "ground_truth": str(row[config.train.answer_field])},
                "extra_info": rated_by(row, text, config),
            }
            for row, chat, text in zip(rows, prompts.chats, prompts.texts, strict=True)
        ]
        write_parquet(directory / f"{split}.parquet", entries)

    def launch(self, config: Config, directory: Path, is_megatron: bool, template: str | None) -> Launch:
        """Return what launch.sh holds. See ExternalEngine."""
        fields = {**_fields(config, directory), **(_megatron(config) if is_megatron else _fsdp(config))}
        if template is not None:
            fields[f"{_MODEL}.custom_chat_template"] = template
        command = [python_of(config), "-m", "verl.trainer.main_ppo"]
        if is_megatron:
            command.append("--config-name=ppo_megatron_trainer")
        variables = {"VERL_FILE_LOGGER_PATH": str(directory / "log.jsonl"),
                     "TENSORBOARD_DIR": str(directory.parent / "tensorboard")}  # fmt: skip
        # Megatron's checkpoint has PEFT's files beside it; FSDP's is in pieces, which verl's own converter joins.
        return Launch(command, fields, variables=variables, afterwards=() if is_megatron else _merge(config, directory))

    def brought_back(self, directory: Path) -> Brought | None:
        """Return what model_merger, or Megatron's checkpoint, left. See ExternalEngine."""
        last = latest_folder(directory / "checkpoints", "global_step_*")
        found = [directory / "merged" / "lora_adapter", *(sorted(last.rglob("adapter")) if last else ())]
        adapter = next((path for path in found if (path / "adapter_config.json").is_file()), None)
        return None if adapter is None else Brought(adapter, logged_steps(directory / "log.jsonl", _COLUMNS))


ENGINE = HandedOver(Verl())


def rated_by(row: Row, prompt: str, config: Config) -> dict[str, Any]:
    """Return what rewards.compute_score wants to know of a row, whose prompt is this text."""
    train = config.train
    return {
        "rewards": list(train.rewards),
        "answer_field": train.answer_field,
        "prompt": prompt,
        "row": json.dumps(row, default=str),
    }


def write_parquet(path: Path, entries: list[dict[str, Any]]) -> None:
    """Write rows as a parquet file. Raises RunDirError."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    content = io.BytesIO()
    Dataset.from_list(entries).to_parquet(content)
    write_bytes(path, content.getvalue())


def _fields(config: Config, directory: Path) -> dict[str, Any]:
    """Return what is the same with FSDP and with Megatron."""
    train, (num_nodes, gpus_per_node) = config.train, nodes_of(config)
    return {
        "algorithm.adv_estimator": "grpo",
        "algorithm.use_kl_in_reward": False,
        "data.train_files": str(directory / "train.parquet"),
        "data.val_files": str(directory / "held_out.parquet"),
        "data.train_batch_size": prompts_per_step(config),
        "data.max_prompt_length": train.max_length,
        "data.max_response_length": train.max_completion_length,
        "data.seed": train.seed,
        "data.trust_remote_code": config.model.trust_remote_code,
        "reward.custom_reward_function.path": str(Path(rewards.__file__)),
        "reward.custom_reward_function.name": rewards.compute_score.__name__,
        f"{_MODEL}.path": resolve(config.model.name_or_path),
        f"{_MODEL}.trust_remote_code": config.model.trust_remote_code,
        f"{_ACTOR}.optim.lr": train.learning_rate,
        f"{_ACTOR}.optim.lr_warmup_steps": train.warmup_steps,
        f"{_ACTOR}.optim.weight_decay": train.weight_decay,
        f"{_ACTOR}.optim.clip_grad": train.max_grad_norm,
        f"{_ACTOR}.use_kl_loss": False,
        f"{_ACTOR}.data_loader_seed": train.seed,
        f"{_ACTOR}.ppo_mini_batch_size": prompts_per_step(config),
        f"{_ACTOR}.ppo_micro_batch_size_per_gpu": train.micro_batch_size,
        f"{_ROLLOUT}.name": "vllm",
        f"{_ROLLOUT}.n": train.num_generations,
        f"{_ROLLOUT}.temperature": train.temperature,
        f"{_ROLLOUT}.seed": train.seed,
        f"{_ROLLOUT}.tensor_model_parallel_size": generation_tp(config),
        f"{_ROLLOUT}.log_prob_micro_batch_size_per_gpu": train.micro_batch_size,
        f"{_REF}.log_prob_micro_batch_size_per_gpu": train.micro_batch_size,
        "trainer.total_training_steps": train.max_steps,
        "trainer.total_epochs": train.max_steps,  # an epoch has a step at least: the steps alone end it
        "trainer.val_before_train": False,
        "trainer.n_gpus_per_node": gpus_per_node,
        "trainer.nnodes": num_nodes,
        "trainer.save_freq": train.save_steps,
        "trainer.default_local_dir": str(directory / "checkpoints"),
        "trainer.logger": ["console", "file", *train.loggers],
        "trainer.project_name": "plop-dist",
        "trainer.experiment_name": config.run_path.name,
    }


def _fsdp(config: Config) -> dict[str, Any]:
    train = config.train
    fields: dict[str, Any] = {
        f"{_ACTOR}.optim.lr_scheduler_type": train.lr_scheduler,
        f"{_ACTOR}.grad_clip": train.max_grad_norm,
        f"{_ACTOR}.fsdp_config.seed": train.seed,
    }
    dtype = config.model.dtype
    if dtype != "auto":
        fields[f"{_ROLLOUT}.dtype"] = dtype
        for role in (_ACTOR, _REF):
            fields[f"{role}.fsdp_config.model_dtype"] = _SHORT[dtype]
            fields[f"+{role}.fsdp_config.mixed_precision.param_dtype"] = _SHORT[dtype]
    return fields


def _megatron(config: Config) -> dict[str, Any]:
    train = config.train
    fields: dict[str, Any] = {
        f"{_ACTOR}.megatron.use_mbridge": True,
        f"{_ACTOR}.megatron.vanilla_mbridge": False,
        f"{_ACTOR}.megatron.seed": train.seed,
        f"{_ACTOR}.optim.lr_decay_style": train.lr_scheduler,
        f"{_ACTOR}.checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
        f"{_MODEL}.lora.dropout": train.lora_dropout,
    }
    if config.model.dtype != "auto":
        fields[f"{_ROLLOUT}.dtype"] = config.model.dtype
    for role in (_ACTOR, _REF):
        fields |= {f"{role}.megatron.{key}": size for key, size in megatron_sizes(config).items()}
        fields[f"{role}.megatron.sequence_parallel"] = config.parallel.sequence_parallel
        if config.model.dtype != "auto":
            fields[f"{role}.megatron.dtype"] = config.model.dtype
    return fields


def _merge(config: Config, directory: Path) -> tuple[str, ...]:
    folder = shlex.quote(str(directory / "checkpoints"))
    merge = [python_of(config), "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    if config.model.trust_remote_code:
        merge.append("--trust-remote-code")
    return (
        f"step=$(cat {folder}/latest_checkpointed_iteration.txt)",
        f'{shlex.join(merge)} --local_dir {folder}/global_step_"$step"/actor --target_dir '
        f"{shlex.quote(str(directory / 'merged'))}",
    )
