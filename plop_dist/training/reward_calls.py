"""How a reward is called: in time, awaited where it is async, its result made sure of, or named with its row."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from plop_dist.errors import ConfigError

Values = list[float | None]
# (prompts, completions, the rows' numbers) and each column by its name, lists of one length
CheckedReward = Callable[..., Values]


def checked(name: str, reward: Callable[..., Any], timeout_s: float | None = None) -> CheckedReward:
    """Return the reward with its result made sure of: one finite number or None for each completion.

    It is called with prompts, completions and, if they are known, the rows' numbers, which messages name. It runs in a
    thread of its own, for at most timeout_s seconds. Raises ConfigError saying what the reward did instead, and for
    which row.
    """

    def call(
        prompts: Sequence[str], completions: Sequence[str], numbers: Sequence[int] | None = None, /, **columns: Any
    ) -> Values:
        def once(keep: slice) -> Any:
            lists = {"prompts": prompts, "completions": completions, **columns}
            return _in_time(name, reward, timeout_s, {key: values[keep] for key, values in lists.items()})

        try:
            returned = once(slice(None))
        except _RaisedError as raised:
            where, error = _failing_row(once, numbers), raised.cause
            raise ConfigError(
                f"train.rewards: '{name}' raised {type(error).__name__}{where}: {error}; it is called with prompts, "
                f"completions and {', '.join(columns)}, each a list: end its parameters with **columns."
            ) from error
        return _values(name, returned, completions, numbers)

    return call


class _RaisedError(Exception):
    """What a reward raised."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _in_time(name: str, reward: Callable[..., Any], timeout_s: float | None, arguments: dict[str, Any]) -> Any:
    """Return what the reward returns, awaited if it is to be. Raises _RaisedError, ConfigError."""
    outcome: list[Any] = []

    def work() -> None:
        try:
            returned = reward(**arguments)
            outcome.append((asyncio.run(_awaited(returned)) if inspect.isawaitable(returned) else returned, None))
        except (Exception, SystemExit) as error:  # a user's code raises whatever it likes
            outcome.append((None, error))

    # A daemon: a reward that never returns must not keep the process from ending.
    thread = threading.Thread(target=work, name=f"reward {name}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        raise ConfigError(
            f"train.rewards: '{name}' has not returned within train.reward_timeout_s ({timeout_s:g} s) for "
            f"{len(arguments['completions'])} completions; make it faster, or raise train.reward_timeout_s."
        )
    returned, error = outcome[0]
    if error is not None:
        raise _RaisedError(error)
    return returned


async def _awaited(returned: Any) -> Any:
    return await returned


def _failing_row(once: Callable[[slice], Any], numbers: Sequence[int] | None) -> str:
    """Return " for row N", the first that a reward fails for when it is asked for that row alone, or nothing."""
    for index, number in enumerate(numbers or ()):
        try:
            once(slice(index, index + 1))
        except (_RaisedError, ConfigError):
            return f" for row {number}"
    return ""


def _values(name: str, returned: Any, completions: Sequence[str], numbers: Sequence[int] | None) -> Values:
    if isinstance(returned, str) or not isinstance(returned, Iterable):
        raise ConfigError(
            f"train.rewards: '{name}' returned a {type(returned).__name__}, expected a list: one number, or None, "
            "for each completion."
        )
    values = list(returned)
    if len(values) != len(completions):
        raise ConfigError(
            f"train.rewards: '{name}' returned {len(values)} values for {len(completions)} completions; return "
            "one for each."
        )
    found: Values = []
    for index, value in enumerate(values):
        where = "" if numbers is None else f" for row {numbers[index]}"
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"train.rewards: '{name}' returned something that is not a number{where}: {error}."
            ) from error
        if number is not None and not math.isfinite(number):
            raise ConfigError(
                f"train.rewards: '{name}' returned {number}{where}, for the completion "
                f"{completions[index][:60]!r}; every value must be finite, or None."
            )
        found.append(number)
    return found
