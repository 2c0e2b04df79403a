"""Whether a thread of this process is still inside Ray, which must then neither be shut down nor left in order.

Ray 2.60 ends the whole process, with status 1 and without a word, once a thread asks it for something after
ray.shutdown() (core_worker_process.cc), and the interpreter's end calls that too. A cluster that was joined ends what
it does for a process that is gone; a local Ray does so seconds later, in which workers go on and write.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

_KILLED_WAIT_S = 10.0  # a process that is killed is gone at once, unless a disk does not answer

_ends: list[threading.Event] = []


def start(work: Callable[[], None]) -> threading.Event:
    """Do in a thread of its own what waits inside Ray, and return what is set when it has come back.

    Not the thread, for join(): in CPython 3.12 one counts as ended once an interrupt has come through that.
    """
    has_ended = threading.Event()

    def run() -> None:
        try:
            work()
        finally:
            has_ended.set()

    _ends[:] = [*(end for end in _ends if not end.is_set()), has_ended]
    threading.Thread(target=run, daemon=True).start()
    return has_ended


def is_inside() -> bool:
    """Tell whether one of the threads has not come back."""
    return not all(has_ended.is_set() for has_ended in _ends)


def end_local() -> None:
    """End the processes of a Ray that this one has started, the workers with it."""
    import psutil

    processes = psutil.Process().children(recursive=True)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=_KILLED_WAIT_S)
