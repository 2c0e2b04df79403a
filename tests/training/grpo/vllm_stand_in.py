"""A simulated vLLM server: its interface of runtime LoRA adapters and completions, over transformers and PEFT.

As a program it takes what of vLLM's arguments it knows: `serve MODEL --port PORT ...`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch


@dataclass
class StandIn:
    """What the server is like, and what it was asked.

    off_by: how much its log-probabilities differ from the model's. completions_left: how many it answers before it
    hangs up on every request. key: whom it answers; None: everyone.
    """

    model: Path
    updates_adapters: bool = True
    max_lora_rank: int = 16
    processed: bool = False
    off_by: float = 0.0
    completions_left: int = 10**9
    key: str | None = None
    port: int = 0
    url: str = ""
    loaded: dict[str, Any] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return status and JSON."""
        if path.endswith("lora_adapter") and not self.updates_adapters:
            return 404, {"detail": "Not Found"}
        if path == "/v1/load_lora_adapter":
            return self._load(body["lora_name"], Path(body["lora_path"]))
        if path == "/v1/unload_lora_adapter":
            self.history.append(f"unload {body['lora_name']}")
            self.loaded.pop(body["lora_name"], None)
            return 200, {}
        if body["model"] not in self.loaded:
            return 404, {"error": f"The model `{body['model']}` does not exist."}
        self.completions_left -= 1
        return 200, {"choices": [self._complete(self.loaded[body["model"]], body)]}

    def _load(self, name: str, directory: Path) -> tuple[int, dict[str, Any]]:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        if not (directory / "adapter_config.json").is_file():
            return 404, {"error": f"Loading lora {name} failed: No adapter found for {directory}"}
        rank = json.loads((directory / "adapter_config.json").read_text())["r"]
        if rank > self.max_lora_rank:
            return 400, {"error": f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}."}
        base = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        self.loaded[name] = PeftModel.from_pretrained(base, directory).eval()
        self.history.append(f"load {name}")
        return 200, {}

    @torch.no_grad()
    def _complete(self, model: Any, body: dict[str, Any]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(body["seed"])
        ids, found, top = list(body["prompt"]), [], []
        for _ in range(body["max_tokens"]):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            scaled = torch.log_softmax(logits / body["temperature"], -1)
            token = int(torch.multinomial(scaled.exp(), 1, generator=generator))
            told = scaled if self.processed else torch.log_softmax(logits, -1)
            ids.append(token)
            found.append(float(told[token]) + self.off_by)
            top.append({"token": float(told.max())})
            if token in body.get("stop_token_ids", ()):
                break
        return {"token_ids": ids[len(body["prompt"]) :], "logprobs": {"token_logprobs": found, "top_logprobs": top}}


@contextmanager
def serving(stand_in: StandIn) -> Iterator[StandIn]:
    """Let it listen on loopback while the block runs; its url is set."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stand_in.lock:
                if stand_in.completions_left <= 0:
                    self.close_connection = True
                    return
                is_known = stand_in.key in (None, self.headers.get("Authorization", "").removeprefix("Bearer "))
                status, said = stand_in.answer(self.path, body) if is_known else (401, {"error": "Unauthorized"})
            text = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", stand_in.port), Handler)
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main(arguments: list[str]) -> None:
    """Serve until the process is ended."""
    options = dict(pairwise(arguments))
    stand_in = StandIn(
        Path(options["serve"]), os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True",
        int(options["--max-lora-rank"]), options["--logprobs-mode"] == "processed_logprobs",
        key=os.environ["VLLM_API_KEY"], port=int(options["--port"]),
    )  # fmt: skip
    with serving(stand_in):
        threading.Event().wait()
