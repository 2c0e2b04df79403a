"""What keeps transformers and its quantisers from saying in a log what is said in our own words."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unheard() -> Iterator[None]:
    """Keep transformers from showing bars, and all packages from logging and warning, for the length of a block."""
    from transformers.utils import logging as own

    disabled, had_bars = logging.root.manager.disable, own.is_progress_bar_enabled()
    # Not the level of each logger: quantisers, and what they import, make theirs as they are imported.
    logging.disable(logging.CRITICAL)
    own.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if had_bars:
            own.enable_progress_bar()
