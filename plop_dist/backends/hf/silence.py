"""What keeps transformers and its quantisers from saying in a log what is said in our own words."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree", "torch.utils.cpp_extension")  # as they are imported


@contextmanager
def unheard() -> Iterator[None]:
    """Keep transformers from showing bars, and it and its quantisers from logging, for the length of a block."""
    from transformers.utils import logging as own

    verbosity, had_bars = own.get_verbosity(), own.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in _TALKATIVE}
    own.set_verbosity(logging.CRITICAL)
    own.disable_progress_bar()
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        own.set_verbosity(verbosity)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if had_bars:
            own.enable_progress_bar()
