"""What SkyRL (0.4) is handed for GRPO: parquet rows with our rewards beside them, and its overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plop_dist.checkpoints.builtin import resolve
from plop_dist.config.schema import Config
from plop_dist.data.texts import Row
from plop_dist.exporters.text import omegaconf_overrides
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
from plop_dist.training.external.left import logged_steps
from plop_dist.training.external.nodes import nodes_of
from plop_dist.training.external.prompts import Prompts
from plop_dist.training.external.train_keys import refuse
from plop_dist.training.external.verl import rated_by, write_parquet

ENVIRONMENT = "plop_dist"  # the name under which skyrl_job registers what rates completions
LOG, TEMPLATE = "PLOP_DIST_SKYRL_LOG", "PLOP_DIST_SKYRL_TEMPLATE"  # variables that skyrl_job reads
_POLICY = "trainer.policy"
_COLUMNS = {"reward": "reward/avg_raw_reward", "loss": "policy/policy_loss", "grad_norm": "policy/raw_grad_norm",
            "learning_rate": "policy/policy_lr"}  # fmt: skip


class SkyRL:
    """SkyRL's trainer, started by skyrl_job, with FSDP or Megatron; adapters alone go to vLLM after each step."""

    name = "skyrl"
    note = ""
    packages: tuple[str, ...] = ("skyrl", "skyrl_gym", "ray", "vllm", "plop_dist")
    trusts_all = True
    reasons: Mapping[str, str] = {}

    def takes(self, is_megatron: bool) -> frozenset[str]:
        """Return the keys of `train` for which it has a word."""
        del is_megatron
        return frozenset({
            "max_steps", "learning_rate", "lr_scheduler", "warmup_steps", "weight_decay", "max_grad_norm",
            "micro_batch_size", "gradient_accumulation_steps", "max_length", "lora_dropout", "save_steps", "seed",
            "rewards", "num_generations", "max_completion_length", "temperature", "loggers",
        })  # fmt: skip

    def check(self, config: Config, is_megatron: bool) -> None:
        """Raise ConfigError for a schedule, a dtype or loggers that it has no word for."""
        if is_megatron and config.train.lr_scheduler != "constant":
            refuse(
                config, self.name, "train.lr_scheduler", "knows only constant with Megatron; set "
                "train.lr_scheduler=constant"
            )  # fmt: skip
        if config.model.dtype == "float16":
            refuse(config, self.name, "model.dtype", "computes in bfloat16 or float32; take one of these")
        if len(config.train.loggers) > 1:
            refuse(config, self.name, "train.loggers", "has one logger besides our own log; name one")

    def home(self, interpreter: Interpreter) -> Path | None:
        """Return the current directory. See ExternalEngine."""
        del interpreter
        return Path.cwd()

    def write_rows(self, directory: Path, split: str, rows: Sequence[Row], prompts: Prompts, config: Config) -> None:
        """Write SPLIT.parquet. See ExternalEngine."""
        entries = [
            {"prompt": chat, "env_class": ENVIRONMENT, "rated_by": rated_by(row, text, config)}
            for row, chat, text in zip(rows, prompts.chats, prompts.texts, strict=True)
        ]
        write_parquet(directory / f"{split}.parquet", entries)

    def launch(self, config: Config, directory: Path, is_megatron: bool, template: str | None) -> Launch:
        """Return what launch.sh holds. See ExternalEngine."""
        fields = {**_fields(config, directory), **(_megatron(config) if is_megatron else _fsdp(config))}
        variables = {LOG: str(directory / "log.jsonl"), "TENSORBOARD_DIR": str(directory.parent / "tensorboard")}
        if template is not None:
            variables[TEMPLATE] = template
        command = [python_of(config), "-m", "plop_dist.training.external.skyrl_job"]
        return Launch(command, fields, write=omegaconf_overrides, variables=variables)

    def brought_back(self, directory: Path) -> Brought | None:
        """Return the adapter that vLLM was handed after the last step. See ExternalEngine."""
        adapter = directory / "adapter"
        if not (adapter / "adapter_config.json").is_file():
            return None
        return Brought(adapter, logged_steps(directory / "log.jsonl", _COLUMNS))


ENGINE = HandedOver(SkyRL())


def _fields(config: Config, directory: Path) -> dict[str, Any]:
    """Return what is the same with FSDP and with Megatron; what nobody asked for is switched off by name."""
    train, (num_nodes, gpus_per_node), tp = config.train, nodes_of(config), generation_tp(config)
    fields: dict[str, Any] = {
        "data.train_data": [str(directory / "train.parquet")],
        "data.val_data": [str(directory / "held_out.parquet")],
        "environment.env_class": ENVIRONMENT,
        f"{_POLICY}.model.path": resolve(config.model.name_or_path),
        f"{_POLICY}.model.lora.dropout": train.lora_dropout,
        f"{_POLICY}.model.lora.lora_sync_path": str(directory / "adapter"),
        f"{_POLICY}.optimizer_config.lr": train.learning_rate,
        f"{_POLICY}.optimizer_config.weight_decay": train.weight_decay,
        f"{_POLICY}.optimizer_config.max_grad_norm": train.max_grad_norm,
        f"{_POLICY}.optimizer_config.num_warmup_steps": train.warmup_steps,
        "trainer.algorithm.advantage_estimator": "grpo",
        "trainer.algorithm.use_kl_loss": False,
        "trainer.placement.colocate_all": True,
        "trainer.placement.policy_num_nodes": num_nodes,
        "trainer.placement.policy_num_gpus_per_node": gpus_per_node,
        "trainer.max_training_steps": train.max_steps,
        "trainer.epochs": train.max_steps,  # an epoch has a step at least: the steps alone end it
        "trainer.train_batch_size": prompts_per_step(config),
        "trainer.policy_mini_batch_size": prompts_per_step(config),
        "trainer.micro_train_batch_size_per_gpu": train.micro_batch_size,
        "trainer.micro_forward_batch_size_per_gpu": train.micro_batch_size,
        "trainer.max_prompt_length": train.max_length,
        "trainer.seed": train.seed,
        "trainer.eval_before_train": False,
        "trainer.eval_interval": -1,
        "trainer.ckpt_interval": train.save_steps,
        "trainer.max_ckpts_to_keep": 2,
        "trainer.ckpt_path": str(directory / "checkpoints"),
        "trainer.export_path": str(directory / "exports"),
        "trainer.log_path": str(directory / "logs"),
        "trainer.logger": train.loggers[0] if train.loggers else "console",
        "trainer.project_name": "plop-dist",
        "trainer.run_name": config.run_path.name,
        "generator.n_samples_per_prompt": train.num_generations,
        "generator.sampling_params.max_generate_length": train.max_completion_length,
        "generator.sampling_params.temperature": train.temperature,
        "generator.inference_engine.tensor_parallel_size": tp,
        "generator.inference_engine.num_engines": config.parallel.world_size // tp,
    }
    if config.model.dtype != "auto":
        fields["trainer.bf16"] = config.model.dtype == "bfloat16"
        fields["generator.inference_engine.model_dtype"] = config.model.dtype
    return fields


def _fsdp(config: Config) -> dict[str, Any]:
    name = config.train.lr_scheduler
    return {
        f"{_POLICY}.optimizer_config.scheduler": "constant_with_warmup" if name == "constant" else name,
    }


def _megatron(config: Config) -> dict[str, Any]:
    fields: dict[str, Any] = {f"{_POLICY}.optimizer_config.scheduler": "constant_with_warmup"}
    for role in (_POLICY, "trainer.ref"):
        fields |= {f"{role}.megatron_config.{key}": size for key, size in megatron_sizes(config).items()}
        key = f"{role}.megatron_config.transformer_config_kwargs.sequence_parallel"
        fields[key] = config.parallel.sequence_parallel
    return fields
