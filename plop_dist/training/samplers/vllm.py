"""A vLLM server writes the completions: it is sent the adapter alone, under a new name for each generation."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from plop_dist import ranks
from plop_dist.backends.hf.load import load_end_tokens
from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError, UserError
from plop_dist.rundir.events import phase
from plop_dist.training.engine import RewardedEngine
from plop_dist.training.loop import StepRefusedError
from plop_dist.training.samplers.noise import noise_key
from plop_dist.training.samplers.own_server import OwnServer, highest_rank
from plop_dist.training.samplers.sampler import Completion, Prompt
from plop_dist.training.samplers.vllm_server import VLLMServer

_MOST_REQUESTS = 64  # at a time and replica; the server batches them
_FAREWELL_WAIT_S = 5.0


class VLLMSampler:
    """A Sampler over a server at train.vllm.url, which must see the run directory under the same path, or its own.

    Base weights never move and nothing is merged: any engine that saves adapters can sample so. The server is tried,
    with the adapter that training begins with, before the first step. Collective over all ranks. Raises ConfigError.
    """

    def __init__(self, engine: RewardedEngine, config: Config, tokenizer: Any) -> None:
        self._engine, self._train = engine, config.train
        self._folder = (config.run_path / "train" / "vllm").resolve()
        # Of this attempt alone: what a server has seen under a name before it serves from its cache.
        self._prefix = ranks.agree(lambda: uuid.uuid4().hex[:8])
        self._end_ids = load_end_tokens(config.model, tokenizer)
        self._is_first = ranks.gathered(engine.dp_rank).index(engine.dp_rank) == ranks.rank()
        self._loaded: str | None = None
        self._own: OwnServer | None = None
        directory = self._saved("check")
        try:
            self._server = self._find_server(config, directory)
            self._load("check", directory)
            ranks.agree(self._check)
        except BaseException:
            self.close()
            raise

    def sample(self, prompts: Sequence[Prompt], generation: int) -> list[Completion]:
        """Return the server's completions. See Sampler. Raises StepRefusedError."""
        name = f"step-{generation}"
        self._load(name, self._saved(name))
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

    def close(self) -> None:
        """End the server that was started, or have one that goes on forget the adapter. See Sampler."""
        if ranks.rank() != 0:
            return
        if self._own is not None:
            self._own.close()
        elif self._loaded is not None:
            with suppress(UserError):  # it may be what has failed
                self._server.patient_for(_FAREWELL_WAIT_S).unload(self._loaded)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _find_server(self, config: Config, adapter: Path) -> VLLMServer:
        """Return the server that is named, or one that rank 0 starts for adapters like this one. Collective."""
        vllm = config.train.vllm
        if vllm.url is not None:
            return VLLMServer(vllm.url, vllm.timeout_s, os.environ.get("VLLM_API_KEY"))
        hosts = sorted(set(ranks.gathered(socket.gethostname())))
        if len(hosts) > 1:
            raise ConfigError(
                f"train.vllm.url names no server, and one that the run starts answers on its own host alone, but the "
                f"ranks are on {', '.join(hosts)}; start one that they all reach and give its address."
            )

        def start() -> tuple[str, str]:
            phase("starting a vLLM server")
            self._own = OwnServer(config, highest_rank(adapter))
            return self._own.url, self._own.key

        url, key = ranks.agree(start)
        return VLLMServer(url, vllm.timeout_s, key)

    def _saved(self, name: str) -> Path:
        """Return the folder with the adapter as it is now. Collective."""
        directory = self._folder / name
        self._engine.save_adapter(directory)
        ranks.barrier()
        return directory

    def _load(self, name: str, directory: Path) -> None:
        """Have the server take an adapter, and forget the one before. Collective."""
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
