"""How memory that is freed leaves the process at once, where glibc would keep it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_M_MMAP_THRESHOLD = -3  # malloc.h
_LEAST = 1 << 18
_USUAL = 1 << 25  # where glibc ends by itself: activations are not mapped anew each time


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Have large blocks that are freed leave the process one by one, for the length of a block.

    glibc raises its threshold for memory of its own mapping with every large block that is freed, and then keeps the
    room between those that stay: a process grows by a whole model of which it never held more than a layer at a time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _LEAST)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _USUAL)
