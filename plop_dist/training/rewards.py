"""What a completion is worth: the project's own rewards, other packages', and a user's `module:function`."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from decimal import Decimal
from functools import partial
from typing import Any

from plop_dist.data.texts import Row
from plop_dist.errors import ConfigError, DataError, suggest
from plop_dist.registry import REWARDS, load
from plop_dist.training.engine import Log
from plop_dist.training.reward_calls import checked

# function(prompts, completions, **columns): one number, or None for "not rated", per completion
Reward = Callable[..., Sequence[Any]]

_PLAIN = str.maketrans({",": None, "$": None, "−": "-"})
# The minus of `7-5` is an operation, that of `= -5` a sign.
_SIGN = r"(?:(?<![\w).])[-−]\$?)?"
_NUMBER = rf"{_SIGN}(?:(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)"
_FINAL_FORM = re.compile(rf"(?:The answer is \$?(?:{_NUMBER})\.|#### \$?(?:{_NUMBER}))\s*$")


def final_number(text: str) -> Decimal | None:
    """Return the last number of a text, or None; commas between thousands and dollar signs do not matter.

    >>> final_number("It costs 3 * 400 = $1,200.")
    Decimal('1200')
    """
    found = re.findall(_NUMBER, text)
    return Decimal(found[-1].translate(_PLAIN)) if found else None


def has_final_form(text: str) -> bool:
    """Tell whether a text ends in `The answer is N.` or in `#### N`."""
    return _FINAL_FORM.search(text) is not None


def load_rewards(names: Sequence[str], rows: Sequence[Row], answer_field: str, *, first: int = 1) -> dict[str, Reward]:
    """Return the rewards of train.rewards by their short names, checked against the training rows.

    A reward is called with prompts and completions, lists of text, and with every column of their rows as a list. One
    that has a parameter `answer_field` is told train.answer_field, the column with the reference answer.
    names: as `config` has checked them. first: the number of the first row, for messages. Raises ConfigError for a
    function that cannot be imported, and DataError for a row without a reference answer.
    """
    rewards: dict[str, Any] = {}
    for name in names:
        function: Any = _imported(name) if ":" in name and name not in REWARDS.own else load(REWARDS, name)
        if not callable(function):
            raise ConfigError(
                f"train.rewards: '{name}' is not a function; expected function(prompts, completions, **columns), async "
                "or not, that returns one number per completion."
            )
        if name == "builtin:number":
            _check_answers(rows, answer_field, first)
        if "answer_field" in _parameters(function):
            function = partial(function, answer_field=answer_field)
        rewards[name.rpartition(":")[2]] = function
    return rewards


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Return the names of the columns that rewards are called with, in one order."""
    return sorted({key for row in rows for key in row} - {"prompts", "completions"})


class RewardHistory:
    """A log that keeps every step's reward on the way to the run's own log."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._rewards: list[float] = []

    def __call__(self, entry: dict[str, Any]) -> None:
        """Note the entry's reward, if any completion of the step was rated, and pass the entry on."""
        if "reward" in entry:
            self._rewards.append(entry["reward"])
        self._log(entry)

    def summary(self) -> dict[str, Any]:
        """Return the first and the last reward, and a note where there was none."""
        if not self._rewards:
            note = "train.rewards rated no completion: nothing was learned."
            return {"note": note, "reward_first": None, "reward_last": None}
        return {"reward_first": self._rewards[0], "reward_last": self._rewards[-1]}


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any], **_: Any
) -> float:
    """Return the sum of the rewards of one completion; the signature by which verl calls a reward.

    extra_info: rewards, answer_field, prompt and row (JSON), as plop_dist.training.external.verl writes them.
    """
    row = json.loads(extra_info["row"])
    total = 0.0
    for name, reward in load_rewards(extra_info["rewards"], [row], extra_info["answer_field"]).items():
        columns = {key: [value] for key, value in row.items() if key not in ("prompts", "completions")}
        total += checked(name, reward)([extra_info["prompt"]], [solution_str], **columns)[0] or 0.0
    return total


def number(completions: Sequence[str], *, answer_field: str, **columns: Any) -> list[float]:
    """Return 1 for each completion whose last number is that of its row's answer, else 0: builtin:number."""
    answers = [final_number(str(answer)) for answer in columns[answer_field]]
    return [float(final_number(text) == answer) for text, answer in zip(completions, answers, strict=True)]


def final_form(completions: Sequence[str], **_: Any) -> list[float]:
    """Return 1 for each completion that ends as has_final_form says, else 0: builtin:format."""
    return [float(has_final_form(text)) for text in completions]


def _parameters(function: Callable[..., Any]) -> Collection[str]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # some that are written in C do not tell
        return ()


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # an installed program does not look into the current directory by itself
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the module does while it is imported: a script reads arguments
        raise ConfigError(
            f"train.rewards: '{name}': module '{module}' cannot be imported ({type(error).__name__}: {error}); name it "
            "as `import` does, not as a file, and install it, or put its directory on PYTHONPATH, on every node."
        ) from error
    function = getattr(found, attribute, None)
    if function is None:
        available = [key for key, value in vars(found).items() if inspect.isfunction(value)]
        raise ConfigError(
            f"train.rewards: '{name}': module '{module}' has no '{attribute}'. {suggest(attribute, available)}"
        )
    return function


def _check_answers(rows: Sequence[Row], field: str, first: int) -> None:
    for number, row in enumerate(rows, start=first):
        if field not in row:
            raise DataError(
                f"row {number} has no column '{field}', which builtin:number compares with; it has "
                f"{', '.join(map(str, row))}: set train.answer_field."
            )
        if final_number(str(row[field])) is None:
            raise DataError(
                f"row {number}: column '{field}' holds no number ({str(row[field])[:40]!r}), but builtin:number needs "
                "one; set train.answer_field, or use another reward."
            )
