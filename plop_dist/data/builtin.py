"""Data that needs no download: seeded word problems, the source of the standard library, uniformly random tokens."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_NUM_PROBLEMS = 2000
_NUM_SOURCES = 2000
_CHUNK_LINES = 40
_NUM_RANDOM = 128

_NAMES = ("Amina", "Ben", "Chen", "Dora", "Emeka", "Farah", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena")
_THINGS = ("apples", "books", "pencils", "stickers", "marbles", "coins", "stamps", "cards", "shells", "tickets")
_PLACES = ("market", "library", "school", "fair", "workshop", "station")


def arithmetic_rows(seed: int = 0, num_rows: int = _NUM_PROBLEMS) -> list[dict[str, str]]:
    """Return word problems with the columns question, answer (worked steps) and number (the final number alone).

    The same seed gives the same rows on every machine; the answer ends in `The answer is N.`
    """
    draw = random.Random(seed)
    return [draw.choice(_KINDS)(draw) for _ in range(num_rows)]


def python_rows(num_rows: int = _NUM_SOURCES) -> list[dict[str, str]]:
    """Return pieces of the running interpreter's standard library, in path order: columns text and source."""
    rows: list[dict[str, str]] = []
    for path, piece in _python_pieces():
        rows.append({"text": piece, "source": path})
        if len(rows) == num_rows:
            break
    return rows


def random_rows(num_rows: int = _NUM_PROBLEMS) -> list[dict[str, str]]:
    """Return rows that stand for random tokens: text says so, and number is what they are drawn by."""
    text = f"{_NUM_RANDOM} tokens, each of the vocabulary as likely as any other"
    return [{"text": text, "number": str(number)} for number in range(num_rows)]


def random_tokens(number: str, seed: int, tokenizer: Any, max_length: int) -> list[int]:
    """Return the tokens of such a row, at most max_length: uniform over the vocabulary without its special tokens.

    Begins as the tokenizer has each text begin (with a token for the beginning, where it has one).
    """
    draw = random.Random(f"{seed}:{number}")
    special = {token for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items() if added.special}
    vocabulary = sorted(set(tokenizer.get_vocab().values()) - special.union(tokenizer.all_special_ids))
    begin = [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]
    return [*begin, *draw.choices(vocabulary, k=_NUM_RANDOM)][:max_length]


def _python_pieces() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")):
        relative = path.relative_to(root)
        if relative.parts[0] in ("test", "site-packages", "dist-packages", "idlelib", "lib2to3"):
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        except (UnicodeDecodeError, OSError):
            continue
        for start in range(0, len(lines), _CHUNK_LINES):
            piece = "".join(lines[start : start + _CHUNK_LINES])
            if piece.strip():
                yield relative.as_posix(), piece


def _row(question: str, steps: str, number: int) -> dict[str, str]:
    return {"question": question, "answer": f"{steps} The answer is {number}.", "number": str(number)}


def _shopping(draw: random.Random) -> dict[str, str]:
    name, thing, place = draw.choice(_NAMES), draw.choice(_THINGS), draw.choice(_PLACES)
    count, price, paid_extra = draw.randint(2, 12), draw.randint(2, 9), draw.randint(1, 20)
    cost = count * price
    paid = cost + paid_extra
    return _row(
        f"{name} buys {count} {thing} at the {place}. Each costs {price} dollars. {name} pays with {paid} dollars. "
        "How many dollars are given back?",
        f"The {thing} cost {count} * {price} = {cost} dollars. The change is {paid} - {cost} = {paid_extra} dollars.",
        paid_extra,
    )


def _sharing(draw: random.Random) -> dict[str, str]:
    giver, thing = draw.choice(_NAMES), draw.choice(_THINGS)
    friends, each, kept = draw.randint(2, 9), draw.randint(2, 12), draw.randint(1, 15)
    total = friends * each + kept
    return _row(
        f"{giver} has {total} {thing}. {giver} keeps {kept} of them and shares the rest equally among {friends} "
        f"friends. How many {thing} does each friend get?",
        f"{total} - {kept} = {total - kept} {thing} are shared. Each friend gets {total - kept} / {friends} = {each}.",
        each,
    )


def _collecting(draw: random.Random) -> dict[str, str]:
    first, second = draw.sample(_NAMES, 2)
    thing = draw.choice(_THINGS)
    start, factor, lost = draw.randint(3, 20), draw.randint(2, 5), draw.randint(1, 9)
    more = start * factor
    total = start + more - lost
    return _row(
        f"{first} has {start} {thing}. {second} has {factor} times as many. Together they lose {lost} of them. "
        f"How many {thing} do they have now?",
        f"{second} has {start} * {factor} = {more}. Together they had {start} + {more} = {start + more}. "
        f"Now they have {start + more} - {lost} = {total}.",
        total,
    )


def _travelling(draw: random.Random) -> dict[str, str]:
    name, place = draw.choice(_NAMES), draw.choice(_PLACES)
    speed, hours, walked = draw.randint(8, 60), draw.randint(2, 6), draw.randint(1, 7)
    ridden = speed * hours
    return _row(
        f"{name} rides to the {place} for {hours} hours at {speed} kilometres an hour and then walks {walked} more "
        "kilometres. How many kilometres is that in all?",
        f"The ride is {hours} * {speed} = {ridden} kilometres. In all it is {ridden} + {walked} = {ridden + walked}.",
        ridden + walked,
    )


_KINDS: tuple[Callable[[random.Random], dict[str, str]], ...] = (_shopping, _sharing, _collecting, _travelling)
