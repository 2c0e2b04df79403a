"""Which configurations GRPO cannot train, whoever trains."""

from __future__ import annotations

import importlib.util

import torch

from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError, MissingExtraError


def check_batch(config: Config) -> None:
    """Raise ConfigError for keys that do not make whole groups of completions, and for rewards' weights and times."""
    train, parallel = config.train, config.parallel
    if train.packing:
        raise ConfigError("train.packing is true with train.method grpo, which has nothing to pack; set it to false.")
    per_step = train.micro_batch_size * train.gradient_accumulation_steps * parallel.dp
    if per_step % train.num_generations:
        raise ConfigError(
            f"train.micro_batch_size * gradient_accumulation_steps * parallel.dp = {per_step} completions per step, "
            f"which train.num_generations = {train.num_generations} does not divide; change one of them."
        )
    if train.reward_weights is not None and len(train.reward_weights) != len(train.rewards):
        raise ConfigError(
            f"train.reward_weights has {len(train.reward_weights)} weights for {len(train.rewards)} rewards "
            f"({', '.join(train.rewards)}); give one for each."
        )
    longest = train.reward_timeout_s * len(train.rewards)
    if parallel.world_size > 1 and longest >= config.cluster.timeout_s:
        raise ConfigError(
            f"train.reward_timeout_s ({train.reward_timeout_s:g}) times {len(train.rewards)} rewards is {longest:g} s, "
            f"but the other ranks wait no longer than cluster.timeout_s ({config.cluster.timeout_s:g} s); lower the "
            "first, or raise the second."
        )


def check_layout(config: Config) -> None:
    """Raise ConfigError for what our own loop (train.engine plop) does not train."""
    parallel = config.parallel
    check_batch(config)
    if parallel.cp > 1:
        raise ConfigError(
            f"train.method is grpo with parallel.cp {parallel.cp}: a completion's tokens lie on several ranks, which "
            "train.engine=plop does not train; use parallel.cp=1, or an engine that runs by itself (train.engine=verl)."
        )


def check_trl(config: Config) -> None:
    """Raise UserError for what TRL's GRPO cannot do; imports nothing of it."""
    train = config.train
    check_batch(config)
    if train.sampler == "vllm":
        raise ConfigError(
            "train.sampler is vllm, which train.engine=plop knows, but TRL trains here; use train.engine=plop, or "
            "leave the completions to the model (train.sampler=model)."
        )
    if train.use_vllm and not torch.cuda.is_available():
        raise ConfigError("train.use_vllm is true, but there is no GPU, which vLLM needs; set train.use_vllm=false.")
    if train.use_vllm and importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("train.use_vllm needs the package 'vllm', which is not installed: pip install vllm")
