"""Which stages of a run are done, and the reason for which one must run again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from plop_dist.checkpoints.folder import digest_of_files
from plop_dist.config.schema import Config
from plop_dist.errors import RunDirError
from plop_dist.rundir.layout import RunDir
from plop_dist.values.files import content_hash, no_pipe, write_json
from plop_dist.values.visible import check_names

_ROWS = ("path", "split", "text_field", "template", "messages_field")


class Stages:
    """The stages of the run that `config` describes; made once, where a run begins, and handed down from there.

    A stage is done when its results are there and all it depends on is as it was: keys of the configuration, local
    files, the results of the stages before it. Local files count as they were when this object was made.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.run_dir = RunDir(config.run_dir)

    def reason_to_run(self, stage: str) -> str | None:
        """Return why a stage must run, or None if its result is there and still fits the configuration."""
        known = self.done().get(stage)
        if known is None:
            return "it has not run yet"
        missing = [name for name in known["outputs"] if not (self.run_dir.path / name).exists()]
        if missing:
            return f"{missing[0]} is missing"
        before, now = _flat(_by_whole_path(known["inputs"])), _flat(_by_whole_path(self.inputs(stage)))
        # files last: a new data.path says more than that another file is there
        for key in sorted(before.keys() | now.keys(), key=lambda key: (key.startswith("files."), key)):
            if not _is_same(before.get(key), now.get(key)):
                return _change(key, before.get(key), now.get(key))
        return None

    def finish(self, stage: str, outputs: list[str]) -> None:
        """Note that a stage is done: what it depended on, and what it wrote (paths below the run directory)."""
        record = {"inputs": json.loads(json.dumps(self.inputs(stage))), "outputs": outputs}
        write_json(self.run_dir.stages, {**self.done(), stage: record})

    def done(self) -> dict[str, Any]:
        """Return what is noted of the stages that are done, by name; nothing where they are no notes of ours.

        Raises RunDirError for names with characters that are not seen.
        """
        try:
            stages = json.loads(no_pipe(self.run_dir.stages).read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(stages, dict):
            return {}
        check_names(stages, str(self.run_dir.stages), "delete it, and the stages run again", RunDirError)
        return {name: stage for name, stage in stages.items() if _is_record(stage)}

    def inputs(self, stage: str) -> dict[str, Any]:
        """Return what a stage's result depends on; a change of any of it makes the stage run again."""
        inputs = self._inputs(stage)
        digests = {key: text for key, text in self._digests.items() if key.partition(".")[0] in inputs}
        return {**inputs, "references": digests} if digests else inputs

    def _inputs(self, stage: str) -> dict[str, Any]:
        config, tree = self.config, self.config.stored()
        if stage == "score":
            inputs = {name: tree[name] for name in ("model", "data", "estimator", "parallel")}
            if config.estimator.stop_when_stable:
                inputs["placement"] = tree["placement"]
            # the LM head is scored only if the placement may choose it
            return {**inputs, "exclude": tree["placement"]["exclude"], "files": self._files}
        if stage == "place":
            return {"placement": tree["placement"], "scores": content_hash(self.run_dir.scores)}
        if stage == "compare":
            rows = {name: tree["data"][name] for name in _ROWS}
            inputs = {name: tree[name] for name in ("model", "parallel", "placement", "train")}
            # Placements by what they say: their paths are others for Ray's workers.
            arms = [content_hash(Path(arm)) or arm if arm.endswith(".json") else arm for arm in config.compare.arms]
            inputs["compare"] = {**tree["compare"], "arms": arms}
            return {**inputs, "data": rows, "scores": content_hash(self.run_dir.scores), "files": self._files}
        placement = content_hash(self.run_dir.placement)
        if stage == "export":
            return {"export": tree["export"], "placement.json": placement}
        return {
            **{name: tree[name] for name in ("model", "parallel", "train")},
            "data": {name: tree["data"][name] for name in _ROWS},
            "export.widen": tree["export"]["widen"],
            "placement.json": placement,
            "files": self._files,
        }

    @cached_property
    def _digests(self) -> dict[str, str]:
        return self.config.reference_digests()

    @cached_property
    def _files(self) -> dict[str, Any]:
        return input_files(self.config)


def input_files(config: Config) -> dict[str, Any]:
    """Return size and time of local inputs: an edited data file or an overwritten checkpoint counts as a change."""
    found = {}
    for key in ("data.path", "train.data_path", "train.eval_path", "model.name_or_path"):
        name = config.value_of(key)
        path = Path(name) if name else None
        if path is not None and path.exists():
            parts = sorted(path.iterdir()) if path.is_dir() else [path]
            label = config.references.get(key, name)
            found[label] = [[part.name, part.stat().st_size, part.stat().st_mtime_ns] for part in parts]
    if config.model.checkpoint is not None:
        label = config.references.get("model.checkpoint", config.model.checkpoint)
        found[label] = digest_of_files(config.model.checkpoint)
    return found


def _is_record(stage: Any) -> bool:
    if not (
        isinstance(stage, dict) and isinstance(stage.get("outputs"), list) and isinstance(stage.get("inputs"), dict)
    ):
        return False
    return all(isinstance(name, str) for name in stage["outputs"])


def _by_whole_path(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    # Ray's workers note whole paths, wherever the command that started them was run.
    files = inputs.get("files")
    if not isinstance(files, Mapping):
        return inputs
    return {
        **inputs,
        "files": {name if "${" in name else os.path.realpath(name): value for name, value in files.items()},
    }


def _is_same(before: Any, now: Any) -> bool:
    if isinstance(before, str) and isinstance(now, str) and before != now:
        return os.path.realpath(before) == os.path.realpath(now) and os.path.exists(now)
    return before == now


def _change(key: str, before: Any, now: Any) -> str:
    if key.startswith("files."):
        return f"{key.removeprefix('files.')} was edited or replaced"
    if key.startswith("references."):
        return f"what {key.removeprefix('references.')} refers to changed"
    if key in ("scores", "placement.json"):
        return f"{'scores.json' if key == 'scores' else key} changed"
    return f"{key} changed from {before!r} to {now!r}"


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping) and tree:
        return {key: value for name in tree for key, value in _flat(tree[name], f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): tree}
