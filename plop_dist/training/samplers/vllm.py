"""A vLLM server writes the completions: it is sent the adapter alone, under a new name for each generation."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from plop_dist import ranks
from plop_dist.backends.hf.load import load_end_tokens
from plop_dist.config.schema import Config
from plop_dist.errors import UserError
from plop_dist.training.engine import RewardedEngine
from plop_dist.training.loop import StepRefusedError
from plop_dist.training.samplers.noise import noise_key
from plop_dist.training.samplers.sampler import Completion, Prompt
from plop_dist.training.samplers.vllm_server import VLLMServer

_MOST_REQUESTS = 64  # at a time and replica; the server batches them


class VLLMSampler:
    """A Sampler over a server at train.vllm.url, which must see the run directory under the same path.

    Base weights never move and nothing is merged: any engine that saves adapters can sample so. The server is tried,
    with the adapter that training begins with, before the first step. Collective over all ranks. Raises ConfigError.
    """

    def __init__(self, engine: RewardedEngine, config: Config, tokenizer: Any) -> None:
        self._engine, self._train = engine, config.train
        self._folder = (config.run_path / "train" / "vllm").resolve()
        # Of this attempt alone: what a server has seen under a name before it serves from its cache.
        self._prefix = ranks.agree(lambda: uuid.uuid4().hex[:8])
        self._server = VLLMServer(str(config.train.vllm.url), config.train.vllm.timeout_s)
        self._end_ids = load_end_tokens(config.model, tokenizer)
        self._is_first = ranks.gathered(engine.dp_rank).index(engine.dp_rank) == ranks.rank()
        self._loaded: str | None = None
        self._load("check")
        ranks.agree(self._check)

    def sample(self, prompts: Sequence[Prompt], generation: int) -> list[Completion]:
        """Return the server's completions. See Sampler. Raises StepRefusedError."""
        self._load(f"step-{generation}")
        found: list[Completion] | None = None
        failed: str | None = None
        if self._is_first:
            try:
                with ThreadPoolExecutor(_MOST_REQUESTS) as pool:
                    found = list(pool.map(lambda prompt: self._complete(prompt, generation), prompts))
            except UserError as error:
                failed = str(error)
        every = ranks.gathered((self._engine.dp_rank, found, failed))
        errors = [message for _, _, message in every if message is not None]
        if errors:
            raise StepRefusedError(errors[0])
        return next(made for dp_rank, made, _ in every if dp_rank == self._engine.dp_rank and made is not None)

    def _load(self, name: str) -> None:
        """Have the server take the adapter as it is now, and forget the one before. Collective."""
        directory = self._folder / name
        self._engine.save_adapter(directory)
        ranks.barrier()
        previous, self._loaded = self._loaded, f"{self._prefix}-{name}"

        def swap() -> None:
            try:
                self._server.load(str(self._loaded), directory)
                if previous is not None:
                    self._server.unload(previous)
            except UserError as error:
                raise StepRefusedError(str(error)) from error
            for folder in self._folder.iterdir():
                if folder != directory:
                    shutil.rmtree(folder, ignore_errors=True)

        ranks.agree(swap)

    def _check(self) -> None:
        self._server.check(str(self._loaded), self._train.temperature)

    def _complete(self, prompt: Prompt, generation: int) -> Completion:
        key = noise_key(self._train.seed, generation, prompt.row, 0)
        ids, log_probabilities = self._server.complete(
            str(self._loaded),
            prompt.ids,
            max_tokens=self._train.max_completion_length,
            temperature=self._train.temperature,
            seed=int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little") >> 1,
            end_ids=self._end_ids,
        )
        return Completion(ids, log_probabilities)
