"""What TRL's trainers share here: their arguments under DeepSpeed, the adapted model, logging, resuming."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from plop_dist import ranks
from plop_dist.backends.hf_load import load_model
from plop_dist.config import Config
from plop_dist.files import write_text
from plop_dist.placement import Placement
from plop_dist.training.adapters import check_complete, lora_config
from plop_dist.training.checkpoint import fingerprint
from plop_dist.training.initial import reset_peft_adapter

Log = Callable[[dict[str, Any]], None]
_MARK = "depends_on.txt"


def trainer_arguments(config: Config, directory: Path) -> dict[str, Any]:
    """Return the arguments that SFTConfig and GRPOConfig have in common; DeepSpeed with backend deepspeed and ranks."""
    train = config.train
    has_gpu = torch.cuda.is_available()
    arguments: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": train.max_steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler,
        "warmup_steps": train.warmup_steps,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "per_device_train_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "seed": train.seed,
        "logging_steps": 1,
        "save_steps": train.save_steps,
        "save_total_limit": 2,
        "use_cpu": not has_gpu,
        "bf16": has_gpu and config.model.dtype == "bfloat16",
        "fp16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "ddp_timeout": int(config.cluster.timeout_s),
        "remove_unused_columns": False,
    }
    if config.parallel.backend == "deepspeed" and dist.is_initialized():  # one rank alone has nothing to partition
        import deepspeed

        # Before the model is loaded, or the batch size is miscounted at stage 3.
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        arguments["deepspeed"] = {
            "zero_optimization": {"stage": config.parallel.zero_stage},
            "train_micro_batch_size_per_gpu": train.micro_batch_size,
            "gradient_accumulation_steps": train.gradient_accumulation_steps,
            "gradient_clipping": train.max_grad_norm,
            "zero_allow_untested_optimizer": True,  # torch's AdamW
            "steps_per_print": 10**9,
        }
    return arguments


def adapted_model(config: Config, placement: Placement) -> nn.Module:
    """Return the loaded model with exactly the placement's adapters, frozen elsewhere. Raises PlacementError.

    At ZeRO-3 it comes partitioned, because the trainer's arguments, which exist by now, say so.
    """
    from peft import get_peft_model

    model = get_peft_model(load_model(config.model), lora_config(placement, config))
    if all(module.storage == "linear" for module in placement.chosen):
        names = [name for name, module in model.named_modules() if hasattr(module, "lora_A") and len(module.lora_A)]
        check_complete([name.removeprefix("base_model.model.") for name in names], placement)
        reset_peft_adapter(model, config.train.seed)
    return model


def last_checkpoint(directory: Path, config: Config, placement: Placement) -> str | None:
    """Return the last whole checkpoint of this very run, or None; others are removed. Collective over the world."""
    key = fingerprint(config, placement)
    mark = directory / _MARK

    def find() -> str | None:
        if not mark.is_file() or mark.read_text() != key:
            shutil.rmtree(directory, ignore_errors=True)
            write_text(mark, key)
            return None
        # trainer_state.json is what the Trainer writes last: without it a checkpoint was cut off.
        whole = [path for path in directory.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
        return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None

    return ranks.agree(find)


class LogCallback(TrainerCallback):
    """Hands the Trainer's own log entries to ours, under our names; state.num_input_tokens_seen gives the speed."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._began, self._num_tokens = 0.0, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note what the step begins with."""
        self._began, self._num_tokens = time.perf_counter(), state.num_input_tokens_seen

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Write one step's entry."""
        if not logs or not {"loss", "reward"} & logs.keys():
            return
        speed = (state.num_input_tokens_seen - self._num_tokens) / (time.perf_counter() - self._began)
        entry: dict[str, Any] = {"step": state.global_step, "tokens_per_second": float(speed)}
        for key in ("loss", "learning_rate", "grad_norm", "reward", "reward_std", "kl"):
            if logs.get(key) is not None:
                entry[key] = float(logs[key])
        means = {key.split("/")[1]: value for key, value in logs.items() if re.fullmatch(r"rewards/.+/mean", key)}
        if len(means) > 1:
            entry |= {f"reward/{name}": float(value) for name, value in means.items() if value is not None}
        self._log(entry)


def save_adapter(trainer: Any, directory: Path) -> None:
    """Write the whole adapter in PEFT's format. Collective over the world: shards are gathered at ZeRO-3."""
    trainer.save_model(str(directory))
    ranks.wait_for_rank_0()
