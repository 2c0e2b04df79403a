"""What rates a completion in SkyRL: the sum of train.rewards, as everywhere else."""

from __future__ import annotations

from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput  # pyright: ignore[reportMissingImports]

from plop_dist.training.rewards import compute_score


class Rated(BaseTextEnv):
    """One turn, after which train.rewards rate the completion."""

    def __init__(self, env_config: Any = None, extras: Any = None) -> None:
        super().__init__()
        del env_config
        self._rated_by = extras["rated_by"]

    def step(self, action: str) -> BaseTextEnvStepOutput:
        """Return the completion's reward."""
        reward = compute_score("", action, "", self._rated_by)
        return BaseTextEnvStepOutput(observations=[], reward=reward, done=True, metadata={})
