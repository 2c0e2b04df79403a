"""Rewards as people write them: async ones, slow ones, ones that raise or return NaN for a row."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import pytest

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
        (slow, "'slow' has not returned within train.reward_timeout_s (0.2 s) for 3 completions"),
    ],
)
def test_the_row_is_named(reward: Any, message: str) -> None:
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=re.escape(message)):
        checked(reward.__name__, reward, 0.2)(["a"] * 3, COMPLETIONS, ROWS)
    assert time.perf_counter() - began < 3
