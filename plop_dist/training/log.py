"""What a training leaves behind while it runs: train/log.jsonl, progress, and the loggers that were asked for."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError, MissingExtraError, first_line
from plop_dist.rundir.training_log import parse_entry
from plop_dist.values.files import append_line, make_folder, remove, write_text

# What the terminal shows of a step, and how it calls it.
_SHOWN = {
    "loss": "loss",
    "reward": "reward",
    "entropy": "entropy",
    "kl": "KL",
    "clip_ratio/region_mean": "clipped",
    "cispo_clip_ratio": "clipped",
    "sampling/sampling_logp_difference/max": "sampler off by",
}


class TrainingLog:
    """Called with one dictionary per optimizer step; only rank 0 (the one with `notify`) writes anything."""

    def __init__(self, config: Config, directory: Path, notify: Callable[..., None] | None) -> None:
        self._directory = directory
        self._notify = notify
        self._config = config
        self._sinks: list[Callable[[int, Mapping[str, float]], object]] = []
        self._close: list[Callable[[], None]] = []
        self._has_begun = False

    def __enter__(self) -> TrainingLog:
        if self._notify is not None:
            make_folder(self._directory, self._directory.parent)
            for name in self._config.train.loggers:
                self._open(name)
        return self

    def __exit__(self, *_: object) -> None:
        for close in self._close:
            close()

    def __call__(self, entry: dict[str, Any]) -> None:
        """Append one entry: its step, numbers by name (train/log.jsonl in the README says which), and nfn by type."""
        if self._notify is None:
            return
        step = entry["step"]
        if not self._has_begun:
            self._has_begun = True
            self._take_over_from(step)
        append_line(self._directory / "log.jsonl", json.dumps({**entry, "time": round(time.time(), 3)}))
        numbers = {key: value for key, value in entry.items() if isinstance(value, float | int) and key != "step"}
        numbers |= {f"nfn/{name}": value for name, value in entry.get("nfn", {}).items()}
        for sink in self._sinks:
            sink(step, numbers)
        if "loss" in entry or "reward" in entry:
            shown = ", ".join(f"{label} {entry[key]:.4f}" for key, label in _SHOWN.items() if key in entry)
            self._notify("training", done=step, total=self._config.train.max_steps, note=shown)

    def _take_over_from(self, step: int) -> None:
        """Take out what an earlier run wrote of this step, now trained (again), of later ones, and of its end."""
        remove(self._directory / "summary.json")
        path = self._directory / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [line for line in lines if (entry := parse_entry(line)) is not None and entry["step"] < step]
        if len(kept) < len(lines):
            write_text(path, "".join(f"{line}\n" for line in kept))

    def _open(self, name: str) -> None:
        try:
            if name == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                writer = SummaryWriter(str(self._directory / "tensorboard"))
                self._sinks.append(lambda step, numbers: [writer.add_scalar(k, v, step) for k, v in numbers.items()])
                self._close.append(writer.close)
            elif name == "wandb":
                import wandb

                os.environ.setdefault("WANDB_DIR", str(self._directory))
                # By itself it also sends what the terminal shows, the command's arguments and the remote's URL.
                only_numbers = {"console": "off", "disable_git": True, "save_code": False, "x_disable_meta": True}
                run = wandb.init(project="plop-dist", name=self._config.run_path.name, settings=only_numbers)
                self._sinks.append(lambda step, numbers: run.log(numbers, step=step))
                self._close.append(run.finish)
            else:
                import mlflow

                if "MLFLOW_TRACKING_URI" not in os.environ:
                    # mlflow's own default is the current directory, which in a worker is nobody's.
                    mlflow.set_tracking_uri(f"sqlite:///{(self._directory / 'mlflow.db').resolve()}")
                mlflow.start_run(run_name=self._config.run_path.name)
                self._sinks.append(lambda step, numbers: mlflow.log_metrics(numbers, step=step))
                self._close.append(mlflow.end_run)
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"train.loggers names '{name}', which is not installed: pip install 'plop-dist[loggers]'"
            ) from error
        except Exception as error:  # each of them has its own kinds: no account, no server, a full disk
            raise ConfigError(
                f"train.loggers: '{name}' cannot begin a run ({type(error).__name__}: {first_line(error)}); log in, "
                "point it at a server that answers (wandb: WANDB_MODE=offline needs neither), or leave it out."
            ) from error
