"""What lies where in a run directory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from plop_dist.errors import RunDirError
from plop_dist.values.files import LINKED, is_pipe, refuse_links


class RunDir:
    """The paths of one run directory; whether anything is there is another question."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.scores = self.path / "scores.json"
        self.placement = self.path / "placement.json"
        self.exports = self.path / "exports"
        self.train = self.path / "train"
        self.training_summary = self.train / "summary.json"
        self.training_log = self.train / "log.jsonl"
        self.training_job = self.train / "job.json"
        self.stop_request = self.train / "stop"  # there while a training runs, with a word in it when it is to end
        self.comparison = self.path / "compare.json"
        self.report = self.path / "report.html"
        self.config = self.path / "config.yaml"
        self.command = self.path / "command.txt"
        self.events = self.path / "events.jsonl"
        self.log = self.path / "log.txt"  # what libraries say
        self.stages = self.path / "stages.json"

    def check(self) -> None:
        """Raise RunDirError for a link in it, through which other files are read or written, a pipe or a device.

        Whoever reads or writes one of the latter may never end.
        """
        refuse_links(self.path, besides=LINKED)
        odd = next((path for path in self.path.rglob("*") if is_pipe(path) and not path.is_symlink()), None)
        if odd is not None:
            raise RunDirError(f"{odd} is a pipe or a device, which no run leaves there; delete it.")

    def prepare(self) -> None:
        """Create the directory and prove that it can be written, before anything is computed. Raises RunDirError.

        What is in it is checked first, so that nothing is written where a link leads to, nor by a library.
        """
        self.check()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path) as probe:
                probe.write(b"0" * 4096)
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error


def unwritable(path: Path, error: OSError) -> RunDirError:
    """Return the error for a run directory that cannot be made or written."""
    return RunDirError(
        f"run_dir '{path}' cannot be written ({error.strerror or error}); make it writable, free space, or choose "
        "another run_dir."
    )
