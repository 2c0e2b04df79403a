"""Which configurations GRPO cannot train, whoever trains."""

from __future__ import annotations

import importlib.util

from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError, DataError, MissingExtraError
from plop_dist.training.data import RowSet
from plop_dist.training.samplers.own_server import check_own_server


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
    if train.vllm.dtype != "auto" and not starts_server(config):
        raise ConfigError(
            f"train.vllm.dtype is {train.vllm.dtype}, which neither TRL nor a server that runs already can be told; "
            "leave it at auto, and start the server with --dtype."
        )
    longest = config.reward_seconds * len(train.rewards)
    if parallel.world_size > 1 and longest >= config.cluster.timeout_s:
        raise ConfigError(
            f"train.reward_timeout_s ({config.reward_seconds:g}) times {len(train.rewards)} rewards is {longest:g} s, "
            f"but the other ranks wait no longer than cluster.timeout_s ({config.cluster.timeout_s:g} s); lower the "
            "first, or raise the second."
        )


def check_fills_a_step(config: Config, rows: RowSet, engine: str) -> None:
    """Raise DataError for fewer rows than one step asks: engines leave out what is left of an epoch, here all of it."""
    train = config.train
    per_step = train.micro_batch_size * train.gradient_accumulation_steps * config.parallel.dp // train.num_generations
    if len(rows.rows) < per_step:
        raise DataError(
            f"{rows.data.path} has {len(rows.rows)} rows to train on, but a step of train.engine '{engine}' asks "
            f"{per_step} prompts of one epoch (train.micro_batch_size * gradient_accumulation_steps * parallel.dp / "
            "num_generations); give it more rows, or lower one of these."
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
    vllm = config.train.vllm
    if sampler_name(config) != "vllm":
        return
    if vllm.mode != "server":
        raise ConfigError(
            f"train.vllm.mode is {vllm.mode}, which is TRL's (train.engine=trl); train.engine=plop asks a server: set "
            "server, and give its address (train.vllm.url) or the Python that is to start one (train.engine_python)."
        )
    if vllm.url is None:
        check_own_server(config)
    if parallel.world_size > 1 and vllm.timeout_s >= config.cluster.timeout_s:
        raise ConfigError(
            f"train.vllm.timeout_s is {vllm.timeout_s:g}, but the other ranks wait no longer than cluster.timeout_s "
            f"({config.cluster.timeout_s:g} s); lower the first, or raise the second."
        )


def check_trl(config: Config) -> None:
    """Raise UserError for what TRL's GRPO cannot do; imports nothing of it."""
    train = config.train
    check_batch(config)
    vllm = train.vllm
    if sampler_name(config) == "vllm" and vllm.mode == "server" and vllm.url is None:
        raise ConfigError(
            "train.sampler is vllm, but train.vllm.url names no server; give it, or train.vllm.mode=colocate."
        )
    if sampler_name(config) == "vllm" and importlib.util.find_spec("vllm") is None:
        raise MissingExtraError(
            "train.sampler is vllm, for which TRL needs the package 'vllm', which is not installed: pip install vllm. "
            "train.engine=plop needs a server alone."
        )


def starts_server(config: Config) -> bool:
    """Tell whether the run starts a vLLM server of its own."""
    train, vllm = config.train, config.train.vllm
    return train.engine != "trl" and train.sampler == "vllm" and vllm.url is None and vllm.mode == "server"


def sampler_name(config: Config) -> str:
    """Return which of the registry's samplers writes the completions."""
    if config.train.sampler != "auto":
        return config.train.sampler
    return "vllm" if config.train.vllm.url is not None else "model"
