"""What TRL's trainers begin with: their arguments, under DeepSpeed where there are ranks, and the adapted model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from plop_dist.backends.hf.load import load_model
from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError
from plop_dist.training.adapters.initial import set_initial
from plop_dist.training.adapters.placed import check_complete, lora_config
from plop_dist.training.adapters.shards import peft_shards
from plop_dist.training.engines.deepspeed import deepspeed_config
from plop_dist.training.trl.checkpoints import checkpoints_of
from plop_dist.values.placement import Placement


def trainer_arguments(config: Config) -> dict[str, Any]:
    """Return the arguments that SFTConfig and GRPOConfig have in common; DeepSpeed with backend deepspeed and ranks."""
    train = config.train
    has_gpu = torch.cuda.is_available()
    arguments: dict[str, Any] = {
        "output_dir": str(checkpoints_of(config)),
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
        arguments["deepspeed"] = deepspeed_config(config)
    return arguments


def adapted_model(config: Config, placement: Placement) -> Any:
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
    base: Any = load_model(config.model)
    _fit_for_trl(base)
    model = get_peft_model(base, adapters)
    shards = peft_shards(model)
    if all(module.storage == "linear" for module in placement.chosen):
        check_complete([shard.fqn for shard in shards], placement)
    set_initial(shards, config.train.seed)
    return model


def _fit_for_trl(model: Any) -> None:
    """Let TRL 1.16 find what it looks for in a model: its part below the head, and the number of experts.

    It multiplies what model.base_model returns by the head's weight: the model itself, where base_model_prefix names
    nothing (Llama 4's text model, which counts its experts in other words too, and returns no routers' logits).
    """
    from transformers import PreTrainedModel

    bodies = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    if model.base_model is model and len(bodies) == 1:
        model.base_model_prefix = bodies[0]
    text = model.config.get_text_config()
    if hasattr(text, "router_aux_loss_coef") and not hasattr(text, "num_experts"):
        text.router_aux_loss_coef = 0.0


@contextmanager
def adapters_kept(model: Any) -> Iterator[None]:
    """Keep the adapters' dtype and values while a trainer of TRL is made around a model.

    Beside a quantised base TRL (1.16) rounds them to bfloat16, in which many of an optimizer's steps are lost; ZeRO
    would keep float32 copies of them, one process would not.
    """
    kept = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
    yield
    for parameter, values in kept.items():
        parameter.data = values
