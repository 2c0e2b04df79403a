"""The trainings that are done: one file for each in RUN_DIR/compare, so that a comparison goes on where it was cut off.

A file's name is a digest of all that a training depends on (training/checkpoint.fingerprint): one of another model,
placement, rate or seed is never taken for it, and a longer comparison finds those of a shorter one.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from plop_dist import ranks
from plop_dist.compare.runs import Base, Record
from plop_dist.config.schema import Config
from plop_dist.errors import ScoresError
from plop_dist.training.checkpoint import fingerprint
from plop_dist.values.files import make_folder, read_json, write_json
from plop_dist.values.placement import Placement


class Store:
    """The records of one run directory. Every method is collective over all ranks: rank 0 reads and writes."""

    def __init__(self, run_dir: Path) -> None:
        self._directory, self._root = run_dir / "compare", run_dir

    def find(self, config: Config, placement: Placement) -> Record | None:
        """Return the record of a training, or None where it was not brought to its end, or is damaged."""
        path = self._path(fingerprint(config, placement))

        def read() -> Record | None:
            with suppress(ScoresError, ValidationError):
                return Record.model_validate(read_json(path, "training", "it is trained again"))
            return None

        return ranks.agree(read)

    def keep(self, config: Config, placement: Placement, record: Record) -> None:
        """Write the record of a training. Raises RunDirError."""
        self._write(fingerprint(config, placement), record.model_dump(mode="json"))

    def find_base(self, config: Config, placement: Placement) -> Base | None:
        """Return what was measured without adapters, or None."""
        path = self._path(self._of_base(config, placement))

        def read() -> Base | None:
            with suppress(ScoresError, ValidationError):
                return Base.model_validate(read_json(path, "values", "they are measured again"))
            return None

        return ranks.agree(read)

    def keep_base(self, config: Config, placement: Placement, base: Base) -> None:
        """Write what was measured without adapters. Raises RunDirError."""
        self._write(self._of_base(config, placement), base.model_dump(mode="json"))

    def _of_base(self, config: Config, placement: Placement) -> str:
        return f"base-{fingerprint(config, placement)}"

    def _path(self, key: str) -> Path:
        return self._directory / f"{key[:40]}.json"

    def _write(self, key: str, tree: object) -> None:
        def write() -> None:
            make_folder(self._directory, self._root)
            write_json(self._path(key), tree)

        ranks.agree(write)
