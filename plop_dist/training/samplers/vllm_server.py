"""What is asked of a vLLM server, and what is wrong where it does not answer as it should."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plop_dist.errors import ConfigError, first_line

_RETRY_SECONDS = 2.0
_LONGEST = 200  # characters of an answer that are shown


class VLLMServer:
    """A server's OpenAI-like interface with runtime LoRA; key: what it is started with, if with any.

    timeout_s: how long an answer, and a server that cannot be reached, is waited for. Every method raises ConfigError
    naming the server and what it said.
    """

    def __init__(self, url: str, timeout_s: float, key: str | None = None) -> None:
        self._url, self._timeout_s, self._key = url.rstrip("/"), timeout_s, key

    def patient_for(self, timeout_s: float) -> VLLMServer:
        """Return the same server, waited for so long."""
        return VLLMServer(self._url, timeout_s, self._key)

    def check(self, name: str, temperature: float) -> None:
        """Make sure that a loaded adapter completes with token ids and the sampled policy's log-probabilities."""
        first, _ = self.complete(name, [1, 1], max_tokens=1, temperature=temperature, seed=0, end_ids=())
        if len(first) != 1:
            raise ConfigError(f"{self._named} returned {len(first)} tokens of one asked for; use a newer vLLM.")
        if temperature == 1.0:
            return
        hottest = [self._highest(name, value) for value in (temperature, 2 * temperature)]
        if abs(hottest[0] - hottest[1]) < 1e-6:
            raise ConfigError(
                f"train.temperature is {temperature:g}, but {self._named} tells log-probabilities as if it were 1; "
                "start it with --logprobs-mode processed_logprobs, or set train.temperature=1."
            )

    def load(self, name: str, directory: Path) -> None:
        """Load the adapter in a folder, which the server must see under the same path."""
        status, said = self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(directory)})
        if status == 404 and "lora" not in said.lower():
            raise ConfigError(
                f"{self._named} knows no /v1/load_lora_adapter; start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment."
            )
        if status != 200:
            raise ConfigError(
                f"{self._named} does not load the adapter in '{directory}' ({status}: {_short(said)}); it must see "
                "that folder under the same path, and be started with --enable-lora and a --max-lora-rank of at least "
                "placement.rank."
            )

    def unload(self, name: str) -> None:
        """Have the server forget an adapter; one that it does not know is forgotten already."""
        status, said = self._post("/v1/unload_lora_adapter", {"lora_name": name})
        if status not in (200, 404):
            raise ConfigError(f"{self._named} does not unload '{name}' ({status}: {_short(said)}).")

    def complete(
        self, name: str, ids: Sequence[int], *, max_tokens: int, temperature: float, seed: int, end_ids: Sequence[int]
    ) -> tuple[list[int], list[float]]:
        """Return the sampled tokens, with the one that ends the text, and the log-probability of each."""
        choice = self._choice(
            {
                "model": name, "prompt": list(ids), "max_tokens": max_tokens, "temperature": temperature, "seed": seed,
                # The server's own defaults are those of the model's generation_config, which is not the policy.
                "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0,
                "presence_penalty": 0.0, "stop_token_ids": list(end_ids), "logprobs": 1, "return_token_ids": True,
            }
        )  # fmt: skip
        tokens, found = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(tokens, list) or not isinstance(found, list) or len(tokens) != len(found) or not tokens:
            raise ConfigError(
                f"{self._named} returns no token_ids with a log-probability each; use vLLM 0.10.2 or newer, without "
                "--max-logprobs 0."
            )
        return tokens, [float("nan") if value is None else float(value) for value in found]

    def _highest(self, name: str, temperature: float) -> float:
        choice = self._choice(
            {"model": name, "prompt": [1, 1], "max_tokens": 1, "temperature": temperature, "seed": 0, "logprobs": 1,
             "return_token_ids": True}
        )  # fmt: skip
        return max((choice.get("logprobs") or {"top_logprobs": [{"": 0.0}]})["top_logprobs"][0].values())

    def _choice(self, request: dict[str, Any]) -> dict[str, Any]:
        status, said = self._post("/v1/completions", request)
        try:
            return json.loads(said)["choices"][0]
        except (ValueError, KeyError, IndexError, TypeError):
            raise ConfigError(f"{self._named} does not complete a prompt ({status}: {_short(said)}).") from None

    def _post(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """Return status and text of the answer; a server that is away is asked again until the time is over."""
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url + path, json.dumps(body).encode(), headers)
        end = time.monotonic() + self._timeout_s
        while True:
            try:
                with urllib.request.urlopen(request, timeout=max(end - time.monotonic(), 0.1)) as answer:
                    return answer.status, answer.read().decode(errors="replace")
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode(errors="replace")
            except (OSError, http.client.HTTPException) as error:
                if time.monotonic() + _RETRY_SECONDS >= end:
                    raise ConfigError(
                        f"{self._named} has not answered within train.vllm.timeout_s ({self._timeout_s:g} s) "
                        f"({first_line(error)}); start it, or give another address."
                    ) from error
                time.sleep(_RETRY_SECONDS)

    @property
    def _named(self) -> str:
        return f"train.vllm.url: the server at {self._url}"


def _short(said: str) -> str:
    return " ".join(said.split())[:_LONGEST]
