"""The shortest names, patterns and substrings against plain searches through all paths; PEFT's rank_pattern as well."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import pytest
from peft.utils.other import get_pattern_key

from plop_dist.exporters.patterns import shortest_patterns
from plop_dist.exporters.rank_pattern import RankPattern
from plop_dist.exporters.substrings import shortest_substrings
from plop_dist.exporters.suffixes import matcher, shortest_names, shortest_names_of
from plop_dist.values.names import natural_key


def models(seed: int, num: int = 150) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the paths of made-up models, whose components hold one another, and those of them that are wanted."""
    draw = random.Random(seed)
    parts = ["q", "up", "gate_up", "up_x", "a", "ba", "0", "1", "10", "11", "mlp", "x", "up_", "u*", "+"]
    for _ in range(num):
        paths = {".".join(draw.choices(parts, k=draw.randint(1, 5))) for _ in range(draw.randint(2, 25))}
        known = sorted(paths)
        yield known, draw.sample(known, draw.randint(1, len(known)))


def names(wanted: list[str], known: list[str]) -> tuple[str, ...]:
    """Return what shortest_names does, by a search through every other path for each name."""
    foreign = [path for path in known if path not in wanted]
    found: dict[str, None] = {}
    for path in sorted(wanted, key=natural_key):
        parts = path.split(".")
        numbers = [index for index, part in enumerate(parts[:-1]) if part.isdigit()]
        ends = [".".join(parts[start:]) for start in reversed(range(numbers[0] + 1 if numbers else 0, len(parts)))]
        free = [end for end in ends if not any(f".{path}".endswith(f".{end}") for path in foreign)]
        found.setdefault(next((end for end in free if not end.partition(".")[0].isdigit()), path))
    return tuple(found)


def test_names_are_those_of_a_plain_search():
    for known, wanted in models(0, 400):
        assert shortest_names(wanted, known) == names(wanted, known)
        assert all(map(matcher(names(wanted, known)), wanted))


def test_groups_are_told_apart_as_one_by_one():
    draw = random.Random(1)
    for known, _ in models(2):
        groups: dict[int, list[str]] = {}
        for path in known:
            groups.setdefault(draw.randint(0, 3), []).append(path)
        assert shortest_names_of(groups, groups) == {
            group: shortest_names(paths, known) for group, paths in groups.items()
        }


def substrings(wanted: list[str], others: list[str]) -> tuple[list[str], str | None]:
    """Return what shortest_substrings does, by a search through every other path for each name."""
    names: list[str] = []
    for path in sorted(set(wanted), key=natural_key):
        if any(name in f"{path}." for name in names):
            continue
        parts = path.split(".")
        ends = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
        forms = [form for end in ends for form in (end, f".{end}", f".{end}.") if form in f"{path}."]
        free = [form for form in (*forms, f"{path}.") if not any(form in f"{other}." for other in others)]
        if not free:
            return names, path
        names.append(free[0])
    return names, None


def test_substrings_are_those_of_a_plain_search():
    num_contained = 0
    for known, wanted in models(3, 600):
        others = [path for path in known if path not in wanted]
        assert shortest_substrings(wanted, others) == substrings(wanted, others), (wanted, others)
        num_contained += substrings(wanted, others)[1] is not None
    assert num_contained


def test_patterns_match_what_is_wanted():
    num_exact = 0
    for known, wanted in models(4, 300):
        patterns = [re.compile("^" + text.replace("*", "(.*)") + "$") for text in shortest_patterns(wanted, known)]
        hit = {path for path in known if any(pattern.match(path) for pattern in patterns)}
        assert hit >= set(wanted)
        # A whole path is all that can be written of one, and its dots stand for any character still.
        stars = [pattern for pattern in patterns if "*" in pattern.pattern]
        astray = {path for path in known if any(pattern.match(path) for pattern in stars)} - set(wanted)
        assert not astray, (astray, patterns)
        num_exact += hit == set(wanted) and bool(stars)
    assert num_exact > 100


@pytest.mark.parametrize("seed", range(3))
def test_ranks_are_those_that_peft_looks_up(seed):
    draw = random.Random(seed)
    num_found = 0
    for known, _ in models(seed + 5):
        ranks = {}
        for path in draw.choices(known, k=6):
            end = path[draw.randrange(len(path) + 1) :] if draw.random() < 0.3 else path.rpartition(".")[2]
            escaped, pattern = re.escape(path), f"({end}|q)"
            forms = [path, escaped, f"^{escaped}", f"^{path}", end, re.escape(end), f".*{end}", pattern, f"{end[1:]}."]
            key = draw.choice(forms)
            try:
                re.compile(key)
            except re.error:
                continue
            ranks[key] = draw.randint(1, 9)
        pattern = RankPattern(ranks)
        for path in known:
            assert pattern.rank_of(path, 99) == ranks.get(get_pattern_key(ranks, path), 99), (path, ranks)
            num_found += pattern.rank_of(path, 99) != 99
    assert num_found


def test_only_expressions_count_as_such():
    ranks = dict.fromkeys(["^model.layers.0.q_proj", r"layers\.0\.q\-proj", "q_proj", "q_(a|b)", "", "a*"], 1)
    assert RankPattern(ranks).regexes == ("q_(a|b)", "", "a*")
