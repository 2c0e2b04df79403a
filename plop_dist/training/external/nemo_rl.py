"""What NeMo-RL (0.6 and 0.7) is handed for GRPO: jsonl rows, and overrides of its example configurations."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plop_dist.checkpoints.builtin import resolve
from plop_dist.config.schema import Config
from plop_dist.data.texts import Row
from plop_dist.errors import DataError
from plop_dist.training.external.handover import (
    Brought,
    HandedOver,
    Launch,
    completions_per_step,
    generation_tp,
    megatron_sizes,
    prompts_per_step,
)
from plop_dist.training.external.interpreter import Interpreter
from plop_dist.training.external.left import latest_folder, mean_of
from plop_dist.training.external.nodes import nodes_of
from plop_dist.training.external.prompts import Prompts
from plop_dist.training.external.train_keys import refuse
from plop_dist.values.files import write_text
from plop_dist.values.names import natural_key

_DTENSOR, _MEGATRON = "policy.dtensor_cfg", "policy.megatron_cfg"
_SCHEDULES = "torch.optim.lr_scheduler"


class NeMoRL:
    """examples/run_grpo.py of NeMo-RL's repository (no part of its package), with DTensor or Megatron."""

    name = "nemo-rl"
    note = "It runs in NeMo-RL's repository, whose math environment rates completions in place of builtin:number."
    packages = ("nemo_rl",)
    trusts_all = True
    reasons: Mapping[str, str] = {
        "rewards": "its math environment compares with the answer, as builtin:number does, and takes no other reward"
    }

    def takes(self, is_megatron: bool) -> frozenset[str]:
        """Return the keys of `train` for which it has a word."""
        del is_megatron
        return frozenset({
            "max_steps", "learning_rate", "lr_scheduler", "warmup_steps", "weight_decay", "max_grad_norm",
            "micro_batch_size", "gradient_accumulation_steps", "max_length", "lora_dropout", "save_steps", "seed",
            "num_generations", "max_completion_length", "temperature", "loggers",
        })  # fmt: skip

    def check(self, config: Config, is_megatron: bool) -> None:
        """Raise ConfigError for a warm-up as long as the training, after which nothing is left to decay."""
        del is_megatron
        if config.train.warmup_steps >= config.train.max_steps and config.train.lr_scheduler != "constant":
            refuse(
                config, self.name, "train.warmup_steps", "decays after the warm-up; lower it below train.max_steps, or "
                "set train.lr_scheduler=constant"
            )  # fmt: skip

    def home(self, interpreter: Interpreter) -> Path | None:
        """Return the repository whose package is installed. See ExternalEngine."""
        package = interpreter.places.get("nemo_rl")
        return package.parent if package is not None and (package.parent / "examples/run_grpo.py").is_file() else None

    def write_rows(self, directory: Path, split: str, rows: Sequence[Row], prompts: Prompts, config: Config) -> None:
        """Write SPLIT.jsonl, and the chat template beside it. Raises DataError for a chat of several messages."""
        field, lines = config.train.answer_field, []
        for number, (row, chat) in enumerate(zip(rows, prompts.chats, strict=True), start=1):
            if [message.get("role") for message in chat] != ["user"]:
                roles = ", ".join(str(message.get("role")) for message in chat)
                raise DataError(
                    f"row {number} of the {split} rows begins with messages of {roles}, but nemo-rl asks with one "
                    "message of the user; give such rows, build a text with train.prompt_template, or use another "
                    "train.engine."
                )
            lines.append(json.dumps({"input": chat[0]["content"], "output": str(row[field])}))
        write_text(directory / f"{split}.jsonl", "\n".join(lines) + "\n")
        if prompts.template is not None:
            write_text(_template(directory), prompts.template)

    def launch(self, config: Config, directory: Path, is_megatron: bool, template: str | None) -> Launch:
        """Return what launch.sh holds. See ExternalEngine."""
        base = "grpo_math_1B_megatron.yaml" if is_megatron else "grpo_math_1B.yaml"
        python = [config.train.engine_python] if config.train.engine_python else ["uv", "run"]
        fields = {**_fields(config, directory), **(_megatron(config) if is_megatron else _dtensor(config))}
        if template is not None:
            fields["+policy.tokenizer.chat_template"] = str(_template(directory))
        return Launch(
            [*python, "examples/run_grpo.py", "--config", f"examples/configs/{base}"],
            fields,
            variables={"NRL_MEGATRON_CHECKPOINT_DIR": str(directory / "base")} if is_megatron else {},
            afterwards=_convert(config, directory) if is_megatron else (),
        )

    def brought_back(self, directory: Path) -> Brought | None:
        """Return what its checkpoint holds, or its converter has written. See ExternalEngine."""
        last = latest_folder(directory / "checkpoints", "step_*")
        found = [directory / "converted", *(sorted(last.rglob("*")) if last else ())]
        adapter = next((path for path in found if (path / "adapter_config.json").is_file()), None)
        logs = latest_folder(directory / "logs", "exp_*")
        if adapter is None or logs is None:
            return None
        steps = []
        for path in sorted(logs.glob("train_data_step*.jsonl"), key=lambda path: natural_key(path.name)):
            reward = mean_of(path, "rewards")
            if reward is not None:
                steps.append({"step": int(path.stem.removeprefix("train_data_step")), "reward": reward})
        return Brought(adapter, steps)


ENGINE = HandedOver(NeMoRL())


def _template(directory: Path) -> Path:
    return directory / "chat_template.jinja"


def _fields(config: Config, directory: Path) -> dict[str, Any]:
    """Return what is the same with DTensor and with Megatron; what nobody asked for is switched off by name."""
    train, (num_nodes, gpus_per_node) = config.train, nodes_of(config)
    fields: dict[str, Any] = {
        "grpo.num_prompts_per_step": prompts_per_step(config),
        "grpo.num_generations_per_prompt": train.num_generations,
        "grpo.max_num_steps": train.max_steps,
        "grpo.max_num_epochs": train.max_steps,  # an epoch has a step at least: the steps alone end it
        "grpo.seed": train.seed,
        "grpo.use_leave_one_out_baseline": False,
        "grpo.val_period": train.save_steps,
        "grpo.max_val_samples": train.eval_samples,
        "grpo.val_batch_size": train.eval_samples,
        "loss_fn.reference_policy_kl_penalty": 0.0,
        "policy.model_name": resolve(config.model.name_or_path),
        "policy.train_global_batch_size": completions_per_step(config),
        "policy.train_micro_batch_size": train.micro_batch_size,
        "policy.max_total_sequence_length": train.max_length + train.max_completion_length,
        "policy.max_grad_norm": train.max_grad_norm,
        "policy.generation.temperature": train.temperature,
        "policy.generation.max_new_tokens": train.max_completion_length,
        "policy.generation.vllm_cfg.tensor_parallel_size": generation_tp(config),
        "data.max_input_seq_length": train.max_length,
        "data.train.dataset_name": "ResponseDataset",
        "+data.train.data_path": str(directory / "train.jsonl"),
        "data.train.split_validation_size": 0,
        "+data.validation.dataset_name": "ResponseDataset",
        "+data.validation.data_path": str(directory / "held_out.jsonl"),
        "data.default.prompt_file": None,
        "data.default.system_prompt_file": None,
        "data.default.processor": "math_hf_data_processor",
        "data.default.env_name": "math",
        "checkpointing.enabled": True,
        "checkpointing.checkpoint_dir": str(directory / "checkpoints"),
        "checkpointing.metric_name": None,
        "checkpointing.keep_top_k": 2,
        "checkpointing.save_period": train.save_steps,
        "logger.log_dir": str(directory / "logs"),
        **{f"logger.{name}_enabled": name in train.loggers for name in ("wandb", "tensorboard", "mlflow")},
        "cluster.gpus_per_node": gpus_per_node,
        "cluster.num_nodes": num_nodes,
    }
    for name, project, run in (("wandb", "project", "name"), ("mlflow", "experiment_name", "run_name")):
        if name in train.loggers:
            fields |= {f"logger.{name}.{project}": "plop-dist", f"logger.{name}.{run}": config.run_path.name}
    if config.model.dtype != "auto":
        fields["policy.precision"] = config.model.dtype
    return fields


def _dtensor(config: Config) -> dict[str, Any]:
    train = config.train
    return {
        "policy.optimizer.kwargs.lr": train.learning_rate,
        "policy.optimizer.kwargs.weight_decay": train.weight_decay,
        "policy.scheduler": _schedule(config),
        f"{_DTENSOR}.lora_cfg.dropout": train.lora_dropout,
        f"{_DTENSOR}.lora_cfg.dropout_position": "pre",
        f"{_DTENSOR}.lora_cfg.use_triton": False,
    }


def _schedule(config: Config) -> list[dict[str, Any]]:
    """Return warm-up and decay as torch's schedulers, one after the other."""
    train = config.train
    length = max(1, train.max_steps - train.warmup_steps)
    decay: dict[str, tuple[str, dict[str, Any]]] = {
        "constant": ("ConstantLR", {"factor": 1.0, "total_iters": length}),
        "linear": ("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": length}),
        "cosine": ("CosineAnnealingLR", {"T_max": length}),
    }
    name, options = decay[train.lr_scheduler]
    schedulers: list[dict[str, Any]] = [{"name": f"{_SCHEDULES}.{name}", "kwargs": options}]
    if train.warmup_steps:
        # torch's factor must be above zero, where our own warm-up begins at one step's share.
        warm = {"start_factor": 1 / (train.warmup_steps + 1), "end_factor": 1.0, "total_iters": train.warmup_steps}
        schedulers = [{"name": f"{_SCHEDULES}.LinearLR", "kwargs": warm}, *schedulers]
    return [*schedulers, {"milestones": [train.warmup_steps] if train.warmup_steps else []}]


def _megatron(config: Config) -> dict[str, Any]:
    train = config.train
    fields: dict[str, Any] = {
        f"{_MEGATRON}.optimizer.lr": train.learning_rate,
        f"{_MEGATRON}.optimizer.min_lr": train.learning_rate if train.lr_scheduler == "constant" else 0.0,
        f"{_MEGATRON}.optimizer.weight_decay": train.weight_decay,
        f"{_MEGATRON}.scheduler.lr_decay_style": train.lr_scheduler,
        f"{_MEGATRON}.scheduler.lr_decay_iters": train.max_steps,
        f"{_MEGATRON}.scheduler.lr_warmup_iters": train.warmup_steps,
        f"{_MEGATRON}.scheduler.lr_warmup_init": 0.0,
        f"{_MEGATRON}.sequence_parallel": config.parallel.sequence_parallel,
        f"{_MEGATRON}.peft.dropout": train.lora_dropout,
        f"{_MEGATRON}.peft.dropout_position": "pre",
        **{f"{_MEGATRON}.{key}": size for key, size in megatron_sizes(config).items()},
    }
    if config.model.dtype != "auto":
        fields[f"{_MEGATRON}.optimizer.bf16"] = config.model.dtype == "bfloat16"
        fields[f"{_MEGATRON}.optimizer.fp16"] = config.model.dtype == "float16"
    return fields


def _convert(config: Config, directory: Path) -> tuple[str, ...]:
    """Return the lines that write the last checkpoint's adapter in PEFT's format, by NeMo-RL's own converter."""
    python = [config.train.engine_python] if config.train.engine_python else ["uv", "run", "--extra", "mcore", "python"]
    command = [*python, "examples/converters/convert_lora_to_hf.py", "--adapter-only",
               "--hf-model-name", resolve(config.model.name_or_path),
               "--hf-ckpt-path", str(directory / "converted")]  # fmt: skip
    folder = shlex.quote(str(directory / "checkpoints"))
    return (
        f"step=$(ls -d {folder}/step_* | sort -V | tail -n 1)",
        f'{shlex.join(command)} --adapter-ckpt "$step"/policy/weights/iter_0000000 '
        '--base-ckpt "$(ls -d "$NRL_MEGATRON_CHECKPOINT_DIR"/*/iter_0000000 | head -n 1)"',
    )
