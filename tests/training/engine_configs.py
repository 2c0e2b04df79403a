"""What an engine's own configuration code makes of launch.sh: `python -m tests.training.engine_configs NAME DIRECTORY`.

Each runs in a process of its own, with the engine (DIRECTORY, from tests/parsers/NAME.txt) last on the path. The
arguments of the engine's command, and its environment, come as JSON on standard input, several of them; what its
configuration then says goes to standard output, under the names by which the tests ask.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any


def check_verl(arguments: list[str]) -> dict[str, Any]:
    """Compose, build every section that the workers build, and run verl's own validation."""
    import verl
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    from plop_dist.backends.megatron.bridge import import_bridge

    is_megatron = "--config-name=ppo_megatron_trainer" in arguments
    if is_megatron:
        import_bridge()
    name = "ppo_megatron_trainer" if is_megatron else "ppo_trainer"
    overrides = [word for word in arguments if "=" in word and not word.startswith("--")]
    configs = str(Path(verl.__file__).parent / "trainer" / "config")
    with initialize_config_dir(config_dir=configs, version_base=None):
        config = compose(name, overrides=overrides)
    OmegaConf.resolve(config)
    # The last of its rules asks vLLM, which is not here, for the LoRA ranks that it knows.
    vllm = types.ModuleType("verl.workers.rollout.vllm_rollout.utils")
    vllm.get_vllm_max_lora_rank = lambda rank: rank  # type: ignore[attr-defined]
    sys.modules |= {"verl.workers.rollout.vllm_rollout": types.ModuleType("vllm_rollout"), vllm.__name__: vllm}
    validate_config(config, use_reference_policy=False, use_critic=False)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    engine = actor.megatron if is_megatron else actor.fsdp_config
    return {
        "nodes": [config.trainer.nnodes, config.trainer.n_gpus_per_node],
        "logger": list(config.trainer.logger),
        "targets": list(model.lora["target_modules"] if is_megatron else model.target_modules),
        "tp": engine.tensor_model_parallel_size if is_megatron else 1,
        "pp": engine.pipeline_model_parallel_size if is_megatron else 1,
        "weight_decay": actor.optim.weight_decay,
        "warmup": actor.optim.lr_warmup_steps,
        "schedule": actor.optim.lr_decay_style if is_megatron else actor.optim.lr_scheduler_type,
        "lora_type": model.lora["type"] if is_megatron else None,
        "prompt": _asked(model.tokenizer, config.data.train_files),
    }


def check_skyrl(arguments: list[str]) -> dict[str, Any]:
    """Build SkyRL's configuration as its main_base does, and run its own validation; and rate a row."""
    from skyrl.train.config import SkyRLTrainConfig
    from skyrl.train.utils import validate_cfg
    from transformers import AutoTokenizer

    from plop_dist.backends.megatron.bridge import import_bridge
    from plop_dist.training.external import skyrl, skyrl_job

    config = SkyRLTrainConfig.from_cli_overrides(arguments[2:])
    validate_cfg(config)
    policy = config.trainer.policy
    import_bridge()  # with a stub of Transformer Engine, which SkyRL's own environment has
    skyrl_job.set_up_worker()
    import skyrl_gym
    from datasets import load_dataset

    (row, *_) = load_dataset("parquet", data_files=config.data.train_data[0])["train"]
    answer = json.loads(row["rated_by"]["row"])["answer"]
    environment = skyrl_gym.make(row["env_class"], env_config={}, extras={"rated_by": row["rated_by"]})
    rated = [environment.step(text)["reward"] for text in (answer, "none")]
    tokenizer = AutoTokenizer.from_pretrained(policy.model.path)
    if skyrl.TEMPLATE in os.environ:
        tokenizer.chat_template = os.environ[skyrl.TEMPLATE]
    return {
        "nodes": [config.trainer.placement.policy_num_nodes, config.trainer.placement.policy_num_gpus_per_node],
        "logger": [config.trainer.logger],
        "targets": list(policy.model.lora.target_modules),
        "lora_type": policy.megatron_config.lora_config.lora_type,
        "merge_lora": policy.megatron_config.lora_config.merge_lora,
        "tp": policy.megatron_config.tensor_model_parallel_size,
        "pp": policy.megatron_config.pipeline_model_parallel_size,
        "weight_decay": policy.optimizer_config.weight_decay,
        "warmup": policy.optimizer_config.num_warmup_steps,
        "schedule": policy.optimizer_config.scheduler,
        "rated": rated,
        "prompt": tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False),
    }


def _asked(tokenizer: Any, path: str) -> str:
    from datasets import load_dataset

    (row, *_) = load_dataset("parquet", data_files=path)["train"]
    return tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)


CHECKS = {"verl": check_verl, "skyrl": check_skyrl}

if __name__ == "__main__":
    sys.path.append(sys.argv[2])
    found = []
    for arguments, environment in json.load(sys.stdin):
        os.environ.clear()
        os.environ.update(environment)
        found.append(CHECKS[sys.argv[1]](arguments))
    print("found: " + json.dumps(found))
