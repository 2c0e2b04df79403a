"""Rewards as people write them: async ones, slow ones, ones that raise or return NaN for a row, or anything else."""

from __future__ import annotations

import asyncio
import functools
import re
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from plop_dist.errors import ConfigError
from plop_dist.training.reward_calls import checked

COMPLETIONS = ["one", "two", "three"]
ROWS = [7, 7, 12]


async def lengths(completions: list[str], **columns: Any) -> list[int]:
    await asyncio.sleep(0)
    return [len(text) for text in completions]


class Judge:
    """A reward that is an object with an async call."""

    async def __call__(self, completions: list[str], weight: list[float], **columns: Any) -> list[float]:
        return weight


def not_three(completions: list[str], **columns: Any) -> list[float]:
    if "three" in completions:
        raise ValueError("no threes")
    return [1.0] * len(completions)


async def later_not_three(completions: list[str], **columns: Any) -> list[float]:
    return not_three(completions)


def only_together(completions: list[str], **columns: Any) -> list[float]:
    if len(completions) > 1:
        raise RuntimeError("too many")
    return [1.0]


def broken(completions: list[str], **columns: Any) -> list[float]:
    return [1.0, float("nan"), 2.0]


def slow(completions: list[str], **columns: Any) -> list[float]:
    time.sleep(5)
    return [0.0] * len(completions)


class Late(BaseException):
    """What libraries raise where an alarm goes off, so that no `except Exception` takes it for an answer."""


def alarmed(completions: list[str], **columns: Any) -> list[float]:
    raise Late("too long a formula")


async def leaving(completions: list[str], **columns: Any) -> list[float]:
    raise SystemExit(3)


def raises_later(completions: list[str], **columns: Any) -> Iterator[float]:
    yield 1.0
    raise ValueError("in the middle")


def never_ends(completions: list[str], **columns: Any) -> Iterator[float]:
    yield 1.0
    time.sleep(5)


def raises_slowly(completions: list[str], **columns: Any) -> list[float]:
    if len(completions) > 1:
        raise RuntimeError("too many")
    time.sleep(5)
    return [0.0]


class Client:
    """A reward with a connection that belongs to the event loop in which it was made, as those of HTTP clients do."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        self.loop = self.loop or asyncio.get_running_loop()
        answered = self.loop.create_future()
        self.loop.call_soon(answered.set_result, [2.0] * len(completions))
        return await answered


def test_an_async_reward_keeps_its_client_from_step_to_step() -> None:
    call = checked("Client", Client())
    assert call(["a"] * 3, COMPLETIONS, ROWS) == call(["a"] * 3, COMPLETIONS, ROWS) == [2.0] * 3


@pytest.mark.parametrize(
    "values",
    [
        (1, True, None), [*np.ones(2), None], iter([1, 1.0, None]),
        [torch.tensor(1.0), np.float32(1), None], {"a": 1, "b": Fraction(1), "c": None}.values(),
    ],
)  # fmt: skip
def test_whatever_has_numbers_in_an_order_is_taken(values: Any) -> None:
    assert checked("values", lambda **_: values)(["a"] * 3, COMPLETIONS, ROWS) == [1.0, 1.0, None]
    given = functools.partial(lambda values, **_: values, torch.ones(3, dtype=torch.bfloat16))
    assert checked("values", given)(["a"] * 3, COMPLETIONS, ROWS) == [1.0] * 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({0: 1.0, 1: 2.0, 2: 3.0}, "'values' returned a dict, expected a list"),
        ({1.0, 2.0, 3.0}, "'values' returned a set, expected a list"),
        (b"abc", "'values' returned a bytes, expected a list"),
        (torch.tensor(1.0), "'values' returned a Tensor, expected a list"),
        (np.array(1.0), "'values' returned a ndarray, expected a list"),
        (torch.ones(3, 2), "'values' returned something that is not a number for row 7: "),
        ([1.0, [2.0], 3.0], "'values' returned something that is not a number for row 7: "),
        ([1.0, 2.0, 10**400], "'values' returned something that is not a number for row 12: int too large"),
        (
            [1.0, 2.0, 1e39],
            "'values' returned 1e+39 for row 12, for the completion 'three'; every value must be finite",
        ),
        ([1.0, 2.0], "'values' returned 2 values for 3 completions"),
    ],
)
def test_whatever_is_no_number_for_each_completion_is_named(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        checked("values", lambda **_: values)(["a"] * 3, COMPLETIONS, ROWS)


def test_async_rewards_are_awaited() -> None:
    assert checked("lengths", lengths)(["a"] * 3, COMPLETIONS, ROWS) == [3, 3, 5]
    assert checked("Judge", Judge())(["a"] * 3, COMPLETIONS, ROWS, weight=[1.0, 2.0, 3.0]) == [1, 2, 3]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (not_three, "'not_three' raised ValueError for row 12: no threes"),
        (later_not_three, "'later_not_three' raised ValueError for row 12: no threes"),
        (only_together, "'only_together' raised RuntimeError: too many"),
        (broken, "'broken' returned nan for row 7, for the completion 'two'"),
        (
            alarmed,
            "'alarmed' raised Late for row 7: too long a formula; it is called, in a thread of its own, with prom",
        ),
        (leaving, "'leaving' raised SystemExit for row 7: 3"),
        (raises_later, "'raises_later' raised ValueError for row 7: in the middle"),
        (never_ends, "'never_ends' has not returned within train.reward_timeout_s (0.2 s)"),
        (raises_slowly, "'raises_slowly' raised RuntimeError: too many"),
        (slow, "'slow' has not returned within train.reward_timeout_s (0.2 s) for 3 completions"),
    ],
)
def test_the_row_is_named(reward: Any, message: str) -> None:
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=re.escape(message)):
        checked(reward.__name__, reward, 0.2)(["a"] * 3, COMPLETIONS, ROWS)
    assert time.perf_counter() - began < 3
