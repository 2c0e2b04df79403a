"""Which rank has failed, on which host, and which others no longer answer: said where ranks are on several hosts."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

from plop_dist.errors import PlopError, UserError

_OTHERS_WAIT_S = 5.0  # ranks of one collective fail within moments of each other
_OTHERS_READ_S = 0.5  # how long rank 0, whose store it is, stays for them
_RANK = re.compile(r"rank (\d+): ")


@contextmanager
def naming_host(hosts: Sequence[str], rank: int) -> Iterator[None]:
    """Have a PlopError that leaves the block say rank and host, and who is silent, where there are several hosts.

    hosts: that of each rank. A mistake of the user's stays as it is unless the operating system found it: any host
    would have met it.
    """
    try:
        yield
    except PlopError as error:
        if len(set(hosts)) > 1:
            error.args = (_named(error, hosts, rank),)
        raise


def _named(error: PlopError, hosts: Sequence[str], rank: int) -> str:
    text = str(error)
    told = _RANK.match(text)
    if told is not None:
        rank, text = int(told[1]), text[told.end() :]
    elif isinstance(error, UserError) and not isinstance(error.__cause__, (OSError, ImportError)):
        return text
    silent = [] if isinstance(error, UserError) else _silent_ranks(len(hosts))
    others = ", ".join(f"rank {other} on {hosts[other]}" for other in silent)
    return f"rank {rank} on {hosts[rank]}: {text}" + (f" No answer from: {others}." if others else "")


def _silent_ranks(world_size: int) -> list[int]:
    """Return which ranks do not say within moments that they live; rank 0 where its store does not answer.

    Every rank that fails comes here. gloo's own messages do not name who is missing where a link was cut.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return []
    own, everyone = dist.get_rank(), range(world_size)
    silent = [] if own == 0 else [0]
    key = "plop-dist/failed/{}".format

    def ask() -> None:
        store = dist.distributed_c10d._get_default_store()  # public ways to a store make another one
        with suppress(RuntimeError):  # its host is gone, or cannot be reached
            store.set(key(own), "1")
            try:
                store.wait([key(rank) for rank in everyone], timedelta(seconds=_OTHERS_WAIT_S))
                silent.clear()
            except RuntimeError:
                silent[:] = [rank for rank in everyone if not store.check([key(rank)])]
            if own == 0:
                time.sleep(_OTHERS_READ_S)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * _OTHERS_WAIT_S)
    return list(silent)
