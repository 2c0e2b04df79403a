"""Models that are built whole, also where ZeRO-3 would have transformers partition every one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unpartitioned() -> Iterator[None]:
    """Have transformers build whole models within the block, also where ZeRO-3 would partition them."""
    from transformers.integrations import deepspeed

    alive = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = alive
