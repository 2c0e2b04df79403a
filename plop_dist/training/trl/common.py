"""What TRL's trainers share here: their arguments under DeepSpeed, the adapted model, logging, resuming."""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainerCallback

from plop_dist import ranks
from plop_dist.backends.hf.load import load_model
from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError, RunDirError
from plop_dist.training.adapters.initial import reset_peft_adapter
from plop_dist.training.adapters.shards import check_complete, lora_config
from plop_dist.training.checkpoint import WITHOUT_IT, fingerprint
from plop_dist.values.files import write_text
from plop_dist.values.placement import Placement

Log = Callable[[dict[str, Any]], None]
_MARK = "depends_on.txt"
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)

logger = logging.getLogger(__name__)


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
    """Return the loaded model with the placement's adapters, widened where export.widen says so, frozen elsewhere.

    At ZeRO-3 it comes partitioned, because the trainer's arguments, which exist by now, say so. Raises PlacementError,
    ExportError for what PEFT cannot adapt, and ConfigError for dropout beside adapted parameters.
    """
    from peft import get_peft_model

    adapters = lora_config(placement, config, widen=config.export.widen)
    if adapters.target_parameters and adapters.lora_dropout:
        names = ", ".join(sorted(adapters.target_parameters))
        raise ConfigError(
            f"train.lora_dropout is {adapters.lora_dropout:g}, but {names} can only be adapted as parameters, which "
            "PEFT gives no dropout; set train.lora_dropout=0, or leave these types out (placement.exclude)."
        )
    model = get_peft_model(load_model(config.model), adapters)
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
        whole = [path for path in directory.glob("checkpoint-*") if _is_whole(path)]
        return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None

    return ranks.agree(find)


def _is_whole(checkpoint: Path) -> bool:
    # trainer_state.json is what the Trainer writes last: without it a checkpoint was cut off.
    state = checkpoint / "trainer_state.json"
    if not state.is_file():
        return False
    try:
        json.loads(state.read_text())
        for path in checkpoint.rglob("*.safetensors"):
            with safe_open(path, "pt"):
                pass
        damaged = [path for path in checkpoint.rglob("*.pt*") if not zipfile.is_zipfile(path)]  # the rngs are .pth
    except (ValueError, OSError, SafetensorError):
        damaged = [state]
    if damaged:
        logger.warning("%s is damaged; %s", checkpoint, WITHOUT_IT)
    return not damaged


@contextmanager
def saving_to(directory: Path) -> Iterator[None]:
    """Raise RunDirError naming the directory when a checkpoint or an adapter cannot be written in the block."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        text = " ".join(str(error).split())
        is_other_system_error = isinstance(error, OSError) and error.errno not in _UNWRITABLE
        if is_other_system_error or (isinstance(error, RuntimeError) and "PytorchStreamWriter" not in text):
            raise
        raise RunDirError(f"{directory} cannot be written: {text}; free space there, and run again.") from error


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
    with saving_to(directory):
        trainer.save_model(str(directory))
    ranks.barrier()
