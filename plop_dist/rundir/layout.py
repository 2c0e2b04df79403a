"""What a run directory holds and which stage must run again, with the reason."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from plop_dist.checkpoints.folder import digest_of_files
from plop_dist.config.schema import Config
from plop_dist.errors import RunDirError
from plop_dist.values.files import write_json, write_text, write_together

STAGES_FILE = "stages.json"


class RunDir:
    """Paths and finished stages of one run directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.scores = self.path / "scores.json"
        self.placement = self.path / "placement.json"
        self.exports = self.path / "exports"
        self.train = self.path / "train"
        self.config = self.path / "config.yaml"
        self.events = self.path / "events.jsonl"
        self.command = self.path / "command.txt"

    def prepare(self) -> None:
        """Create the directory and prove that it can be written, before anything is computed. Raises RunDirError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path) as probe:
                probe.write(b"0" * 4096)
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            raise RunDirError(
                f"run_dir '{self.path}' cannot be written ({error.strerror or error}); make it writable, free space, "
                "or choose another run_dir."
            ) from error

    @contextmanager
    def kept_config(self, config: Config, command: str) -> Iterator[None]:
        """Write the resolved configuration and the command that reproduces the run.

        A block that raises before any stage is done leaves those that belong to the results that are there.
        """
        from omegaconf import OmegaConf

        files = (self.config, self.command)
        before = {path: path.read_bytes() for path in files if path.is_file()}
        results = (self._stages(), content_hash(self.scores))
        write_text(self.config, OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))
        write_text(self.command, command + "\n")
        try:
            yield
        except BaseException:
            if results[0] and results == (self._stages(), content_hash(self.scores)):
                with suppress(RunDirError):  # what is being raised says more
                    write_together(before)
            raise

    def reason_to_run(self, stage: str, inputs: Mapping[str, Any]) -> str | None:
        """Return why a stage must run, or None if it is done with these inputs and its result is still there."""
        known = self._stages().get(stage)
        if known is None:
            return "it has not run yet"
        missing = [name for name in known["outputs"] if not (self.path / name).exists()]
        if missing:
            return f"{missing[0]} is missing"
        before, now = _flat(known["inputs"]), _flat(inputs)
        # files last: a new data.path says more than that another file is there
        for key in sorted(before.keys() | now.keys(), key=lambda key: (key.startswith("files."), key)):
            if before.get(key) != now.get(key):
                return _change(key, before.get(key), now.get(key))
        return None

    def finish(self, stage: str, inputs: Mapping[str, Any], outputs: list[str]) -> None:
        """Note that a stage is done: what it depended on, and what it wrote (paths below the run directory)."""
        stages = {**self._stages(), stage: {"inputs": json.loads(json.dumps(inputs)), "outputs": outputs}}
        write_json(self.path / STAGES_FILE, stages)

    def _stages(self) -> dict[str, Any]:
        try:
            stages = json.loads((self.path / STAGES_FILE).read_text())
        except (OSError, json.JSONDecodeError, UnicodeDecodeError):
            return {}  # nothing certain is known: everything runs
        if not isinstance(stages, dict):
            return {}
        return {name: stage for name, stage in stages.items() if _is_record(stage)}


def stage_inputs(stage: str, config: Config) -> dict[str, Any]:
    """Return what a stage's result depends on; a change of any of it makes the stage run again."""
    run = RunDir(config.run_dir)
    tree = config.model_dump(mode="json")
    if stage == "score":
        inputs = {name: tree[name] for name in ("model", "data", "estimator", "parallel")}
        if config.estimator.stop_when_stable:
            inputs["placement"] = tree["placement"]
        # the LM head is scored only if the placement may choose it
        return {**inputs, "exclude": tree["placement"]["exclude"], "files": input_files(config)}
    if stage == "place":
        return {"placement": tree["placement"], "scores": content_hash(run.scores)}
    if stage == "export":
        return {"export": tree["export"], "placement.json": content_hash(run.placement)}
    return {
        **{name: tree[name] for name in ("model", "parallel", "train")},
        "data": {name: tree["data"][name] for name in ("path", "split", "text_field", "template", "messages_field")},
        "export.widen": tree["export"]["widen"],
        "placement.json": content_hash(run.placement),
        "files": input_files(config),
    }


def is_of_placement(summary: Any, run: RunDir) -> bool:
    """Tell whether a training's summary belongs to the placement that is there now, not to an earlier one."""
    trained = summary.get("placement") if isinstance(summary, dict) else None
    return trained is None or trained == content_hash(run.placement)


def content_hash(path: Path) -> str | None:
    """Return a short hash of a file's content, None if it is absent."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None


def input_files(config: Config) -> dict[str, Any]:
    """Return size and time of local inputs: an edited data file or an overwritten checkpoint counts as a change."""
    found = {}
    for name in (config.data.path, config.train.data_path, config.train.eval_path, config.model.name_or_path):
        path = Path(name) if name else None
        if path is not None and path.exists():
            parts = sorted(path.iterdir()) if path.is_dir() else [path]
            found[str(name)] = [[part.name, part.stat().st_size, part.stat().st_mtime_ns] for part in parts]
    if config.model.checkpoint is not None:
        found[config.model.checkpoint] = digest_of_files(config.model.checkpoint)
    return found


def _is_record(stage: Any) -> bool:
    if not (
        isinstance(stage, dict) and isinstance(stage.get("outputs"), list) and isinstance(stage.get("inputs"), dict)
    ):
        return False
    return all(isinstance(name, str) for name in stage["outputs"])


def _change(key: str, before: Any, now: Any) -> str:
    if key.startswith("files."):
        return f"{key.removeprefix('files.')} was edited or replaced"
    if key in ("scores", "placement.json"):
        return f"{'scores.json' if key == 'scores' else key} changed"
    return f"{key} changed from {before!r} to {now!r}"


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping) and tree:
        return {key: value for name in tree for key, value in _flat(tree[name], f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): tree}
