"""How a training is stopped so that nothing is lost: the step is finished, a checkpoint written, and then it ends."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from plop_dist import ranks
from plop_dist.rundir.layout import RunDir
from plop_dist.training.sums import sum_over
from plop_dist.values.files import remove

_SECOND_SECONDS = 1.0  # a launcher hands its own signal on: what comes together is one request


class Stopping:
    """Whether this training has been asked to stop: by a signal to any rank, or by the driver of Ray's workers."""

    def __init__(self, request: Path) -> None:
        self._request = request
        self._signal: int | None = None
        self._at = 0.0

    def is_asked(self, device: torch.device | None = None) -> bool:
        """Tell whether to stop, the same on every rank. Collective over the world."""
        asked = self._signal is not None
        if ranks.rank() == 0 and self._request.is_file():
            asked = asked or self._request.read_text() != ""
        if not dist.is_initialized():
            return asked
        return sum_over(dist.group.WORLD, float(asked), device=device or torch.device("cpu"))[0] > 0

    def leave(self) -> None:
        """End this process's run as the signal would have. Raises SystemExit, with 130 where another got the signal."""
        raise SystemExit(128 + (self._signal or signal.SIGINT))

    def take(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; a second one, later, is obeyed at once. Raises KeyboardInterrupt."""
        if self._signal is not None and time.monotonic() - self._at > _SECOND_SECONDS:
            raise KeyboardInterrupt
        if self._signal is None:
            self._signal, self._at = number, time.monotonic()


@contextmanager
def stoppable(run_dir: RunDir) -> Iterator[Stopping]:
    """Take SIGINT and SIGTERM as requests while the block runs, and those that the driver leaves in a file."""
    stopping = Stopping(run_dir.stop_request)
    if ranks.rank() == 0:
        run_dir.stop_request.parent.mkdir(parents=True, exist_ok=True)
        run_dir.stop_request.write_text("")
    is_main = threading.current_thread() is threading.main_thread()
    previous = {}
    if is_main:
        previous = {number: signal.signal(number, stopping.take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if ranks.rank() == 0:
            remove(run_dir.stop_request)
