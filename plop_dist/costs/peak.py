"""The most memory that this process has held since a moment: its resident set, or what CUDA's allocator gave out."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

import torch


def begin() -> None:
    """Count from here on, from what is held now."""
    _give_back_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        _reset_max_rss()


def read() -> int:
    """Return the peak in bytes."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _max_rss()


def _give_back_freed_memory() -> None:
    """Let the process return what loading has freed: glibc keeps it otherwise, more or less by chance."""
    gc.collect()
    if hasattr(trim := ctypes.CDLL(None), "malloc_trim"):
        trim.malloc_trim(0)


def _reset_max_rss() -> None:
    # Else reading the checkpoint would be the peak of every variant. Linux: proc(5), clear_refs.
    clear_refs = Path("/proc/self/clear_refs")
    if os.access(clear_refs, os.W_OK):
        clear_refs.write_text("5")


def _max_rss() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
