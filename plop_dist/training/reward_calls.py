"""How a reward is called: in time, awaited where it is async, its result made sure of, or named with its row."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import Future
from typing import Any

from plop_dist.errors import ConfigError, first_line

Values = list[float | None]
# (prompts, completions, the rows' numbers) and each column by its name, lists of one length
CheckedReward = Callable[..., Values]

_LARGEST = 3.4028234663852886e38  # of float32, in which advantages are computed


def checked(name: str, reward: Callable[..., Any], timeout_s: float | None = None) -> CheckedReward:
    """Return the reward with its result made sure of: one finite number or None for each completion.

    It is called with prompts, completions and, if they are known, the rows' numbers, which messages name. It runs in a
    thread of its own, for at most timeout_s seconds, in which the row that it fails for is looked for as well. Raises
    ConfigError saying what the reward did instead, and for which row.
    """

    def call(
        prompts: Sequence[str], completions: Sequence[str], numbers: Sequence[int] | None = None, /, **columns: Any
    ) -> Values:
        ends = None if timeout_s is None else time.monotonic() + timeout_s

        def once(keep: slice) -> Any:
            lists = {"prompts": prompts, "completions": completions, **columns}
            left = None if ends is None else ends - time.monotonic()
            if left is not None and left <= 0:
                raise _LateError
            return _in_time(name, reward, left, {key: values[keep] for key, values in lists.items()})

        try:
            returned = once(slice(None))
        except _LateError as error:
            raise ConfigError(
                f"train.rewards: '{name}' has not returned within train.reward_timeout_s ({timeout_s:g} s) for "
                f"{len(completions)} completions; make it faster, or raise train.reward_timeout_s."
            ) from error
        except _RaisedError as raised:
            where, error = _failing_row(once, numbers), raised.cause
            raise ConfigError(
                f"train.rewards: '{name}' raised {type(error).__name__}{where}: {error}; it is called, in a thread of "
                f"its own, with prompts and completions, lists of text, and with {', '.join(columns) or 'no column'}, "
                "each a list: end its parameters with **columns."
            ) from error
        return _values(name, returned, completions, numbers)

    return call


class _RaisedError(Exception):
    """What a reward raised."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _LateError(Exception):
    """A reward's time is over."""


def _in_time(name: str, reward: Callable[..., Any], timeout_s: float | None, arguments: dict[str, Any]) -> Any:
    """Return what the reward returns, awaited if it is to be, as a list. Raises _RaisedError, _LateError."""
    outcome: list[tuple[Any, BaseException | None]] = []
    awaited: list[Future[Any]] = []

    def work() -> None:
        try:
            returned = reward(**arguments)
            if inspect.isawaitable(returned):
                awaited.append(asyncio.run_coroutine_threadsafe(_awaited(returned), _event_loop(os.getpid())))
                returned, error = awaited[0].result()
                if error is not None:
                    raise error
            outcome.append((list(returned) if _is_list(returned) else returned, None))
        except BaseException as error:  # a user's code raises whatever it likes
            outcome.append((None, error))

    # A daemon: a reward that never returns must not keep the process from ending.
    thread = threading.Thread(target=work, name=f"reward {name}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        for future in awaited:
            future.cancel()
        raise _LateError
    returned, error = outcome[0]
    if error is not None:
        raise _RaisedError(error)
    return returned


@functools.cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """Return the one loop that awaits all rewards: the client of a server that one keeps is of no use in another.

    process: this one's id; what it was forked from keeps the thread of its own loop.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards that are awaited", daemon=True).start()
    return loop


async def _awaited(returned: Any) -> tuple[Any, BaseException | None]:
    try:
        return await returned, None
    except BaseException as error:  # SystemExit would end the loop
        return None, error


def _failing_row(once: Callable[[slice], Any], numbers: Sequence[int] | None) -> str:
    """Return " for row N", the first that a reward fails for when it is asked for that row alone, or nothing."""
    for index, number in enumerate(numbers or ()):
        try:
            once(slice(index, index + 1))
        except _RaisedError:
            return f" for row {number}"
        except _LateError:
            break
    return ""


def _is_list(returned: Any) -> bool:
    """Tell whether it has values in an order; a tensor without dimensions has an iterator that fails."""
    is_ordered = isinstance(returned, Iterable) and not isinstance(returned, str | bytes | Mapping | Set)
    return is_ordered and getattr(returned, "ndim", None) != 0


def _values(name: str, returned: Any, completions: Sequence[str], numbers: Sequence[int] | None) -> Values:
    if not isinstance(returned, list):
        raise ConfigError(
            f"train.rewards: '{name}' returned a {type(returned).__name__}, expected a list: one number, or None, "
            "for each completion."
        )
    if len(returned) != len(completions):
        raise ConfigError(
            f"train.rewards: '{name}' returned {len(returned)} values for {len(completions)} completions; return "
            "one for each."
        )
    found: Values = []
    for index, value in enumerate(returned):
        where = "" if numbers is None else f" for row {numbers[index]}"
        try:
            number = None if value is None else float(value)
        except Exception as error:  # each kind of value has its own
            raise ConfigError(
                f"train.rewards: '{name}' returned something that is not a number{where}: {first_line(error)}."
            ) from error
        if number is not None and not abs(number) <= _LARGEST:
            raise ConfigError(
                f"train.rewards: '{name}' returned {number}{where}, for the completion "
                f"{completions[index][:60]!r}; every value must be finite in float32, or None."
            )
        found.append(number)
    return found
