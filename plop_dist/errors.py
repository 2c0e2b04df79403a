"""The errors that plop_dist raises, and the exit status each one stands for.

A `UserError` is the user's to mend (configuration, data, checkpoint): the CLI prints its message without a traceback
and exits with status 2. Everything else that fails while running exits with status 1.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Where frameworks begin to say how a file with code in it is loaded all the same; they say nothing else after it.
_ADVICE = re.compile(
    r"Weights only load failed|\bweights_only\b[^.\n]{0,80}\bFalse\b|\ballow_pickle=|TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
)
_INSTEAD = "the file is damaged, or holds objects other than tensors, which are never unpickled"


class PlopError(Exception):
    """Base of every error this package raises on purpose."""

    exit_status = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(without_advice(message))


class UserError(PlopError, ValueError):
    """Bad input; the message names field, value, expectation and remedy."""

    exit_status = 2


class ConfigError(UserError):
    """The configuration is malformed or contradicts itself."""


class DataError(UserError):
    """The calibration data cannot be read or holds nothing to read."""


class ModelError(UserError):
    """The model cannot be found, loaded or understood."""


class LayoutError(UserError):
    """The parallel layout does not divide the model or does not match the workers."""


class ScoresError(UserError):
    """A scores or placement file is missing, malformed, or of another schema."""


class PlacementError(UserError):
    """No placement satisfies the policy, or a target matches no module."""


class RankError(PlacementError):
    """Every adapter of a placement has a higher rank than any update of its weight can have."""


class ExportError(UserError):
    """The target framework cannot express this placement as it is.

    types: the types that stand in the way, where leaving them out of the choice helps.
    """

    def __init__(self, text: str, types: Iterable[str] = ()) -> None:
        super().__init__(text)
        self.types = tuple(types)


class NonFiniteWeightsError(UserError):
    """Weights hold NaN or infinity. The scores of every other module have been written."""


class MissingExtraError(UserError):
    """A package that this step needs is not installed; the message holds the pip command."""


class RunDirError(UserError):
    """The run directory cannot be written or holds something unexpected."""


class CollectiveError(PlopError):
    """A collective failed or timed out; the message names rank, group and operation."""


class WorkerError(PlopError):
    """A worker died or raised; the message names its rank."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception says, without its full stop, or its class where it says nothing.

    >>> first_line(ValueError("no such column.\\nStack: ..."))
    'no such column'
    >>> first_line(EOFError())
    'EOFError'
    """
    text = without_advice(str(error))
    return text.strip().partition("\n")[0].strip().rstrip(".") or type(error).__name__


def without_advice(text: str) -> str:
    """Return what an exception says with our own words in place of a framework's advice to load code after all.

    >>> without_advice("broken: Weights only load failed. (1) Re-running `torch.load` with `weights_only` ...")
    'broken: the file is damaged, or holds objects other than tensors, which are never unpickled'
    """
    found = _ADVICE.search(text)
    if found is None:
        return text
    kept = max(text.rfind(end, 0, found.start()) + len(end) for end in (". ", ": ", "\n"))
    return (text[:kept] if kept > 1 else "") + _INSTEAD


def as_cause(error: BaseException) -> BaseException | None:
    """Return the error to raise another one from: None where its traceback would show such advice to a caller."""
    seen: BaseException | None = error
    while seen is not None:
        if _ADVICE.search(str(seen)):
            return None
        seen = seen.__cause__ or seen.__context__
    return error


def suggest(name: str, available: Iterable[str]) -> str:
    """Return a sentence with the near matches of `name` and everything that is available.

    >>> suggest("megatorn", ["deepspeed", "megatron"])
    "Did you mean 'megatron'? Available: deepspeed, megatron."
    """
    choices = sorted(available)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return f"{hint}Available: {', '.join(choices)}."
