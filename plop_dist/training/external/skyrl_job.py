"""SkyRL's main_base with what this run adds to it: our rewards, our log, and CanonicalLoRA for a part of a linear.

launch.sh runs it as a module, with KEY=VALUE ..., in SkyRL's own Python.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from typing import Any

from plop_dist.training.external.skyrl import ENVIRONMENT, LOG, TEMPLATE
from plop_dist.training.rewards import compute_score

_HERE = "plop_dist.training.external.skyrl_job"


def main(arguments: list[str]) -> None:
    """Check the configuration by SkyRL's own rules, and train."""
    import ray
    from skyrl.train.config import SkyRLTrainConfig
    from skyrl.train.utils import validate_cfg
    from skyrl.train.utils.utils import initialize_ray

    config = SkyRLTrainConfig.from_cli_overrides(arguments)
    validate_cfg(config)
    # Ray asks this of every process that its driver starts, before SkyRL's own environment is added.
    os.environ["RAY_RUNTIME_ENV_HOOK"] = f"{_HERE}.with_worker_setup"
    initialize_ray(config)
    variables = {name: os.environ[name] for name in (LOG, TEMPLATE) if name in os.environ}
    ray.get(ray.remote(num_cpus=1)(train).remote(config, variables))


def with_worker_setup(runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    """Return a Ray runtime environment in which every worker begins with set_up_worker."""
    return {**(runtime_env or {}), "worker_process_setup_hook": f"{_HERE}.set_up_worker"}


def set_up_worker() -> None:
    """Mend Bridge's CanonicalLoRA where there is one, and register what rates completions."""
    if _is_there("megatron.bridge"):
        import plop_dist.canonical_lora  # noqa: F401 - importing it is what mends
    if _is_there("skyrl_gym"):
        from skyrl_gym.envs.registration import register, registry

        if ENVIRONMENT not in registry:
            register(id=ENVIRONMENT, entry_point=environment)


def environment(env_config: Any = None, extras: Any = None) -> Any:
    """Return SkyRL's environment of one prompt: one turn, after which train.rewards rate the completion."""
    from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

    class Rated(BaseTextEnv):
        def step(self, action: str) -> Any:
            reward = compute_score("", action, "", extras["rated_by"])
            return BaseTextEnvStepOutput(observations=[], reward=reward, done=True, metadata={})

    del env_config
    return Rated()


def train(config: Any, variables: dict[str, str]) -> None:
    """Run SkyRL's experiment in this process, with the prompts' template, and a log that we read afterwards."""
    from skyrl.train.entrypoints.main_base import BasePPOExp

    os.environ.update(variables)
    set_up_worker()

    class Experiment(BasePPOExp):
        def get_train_dataset(self) -> Any:
            # The first that asks for the tokenizer: prompts that are no chats are written as they are.
            if TEMPLATE in os.environ:
                self.tokenizer.chat_template = os.environ[TEMPLATE]
            return super().get_train_dataset()

        def get_tracker(self) -> Any:
            return Noted(super().get_tracker(), os.environ[LOG])

    Experiment(config).run()


class Noted:
    """A tracker that writes what it is told into a file of ours, and hands it on."""

    def __init__(self, tracker: Any, path: str) -> None:
        self._tracker, self._path = tracker, path

    def log(self, data: dict[str, Any], step: int, **options: Any) -> None:
        """Add one line: the step and its numbers."""
        numbers = {key: float(value) for key, value in data.items() if _is_number(value)}
        with open(self._path, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, "data": numbers}) + "\n")
        self._tracker.log(data, step=step, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tracker, name)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
