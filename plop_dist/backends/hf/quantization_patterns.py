"""Whether the patterns by which a quantised checkpoint leaves modules out can be matched in time, before it is loaded.

transformers matches each entry of `modules_to_not_convert` and its like with every module's path as a regular
expression (transformers 5.12, quantizers_utils.should_convert_module), compressed-tensors those that begin with `re:`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from plop_dist.values.time_limit import Pattern, check_time

_NAME = re.compile(r"[\w.\-/]*", re.ASCII)  # matched in one pass, whatever its dots stand for


def check_quantization_patterns(hf_config: Any, names: Callable[[], Collection[str]], where: str) -> None:
    """Raise ConfigError naming the pattern of quantization_config that takes too long on the model's names.

    names: makes the modules' paths, called where there is a pattern at all. where: what the configuration was read
    from, for the message.
    """
    patterns = list(_patterns(getattr(hf_config, "quantization_config", None), "quantization_config"))
    if patterns:
        check_time(patterns, names(), where)


def _patterns(tree: Any, field: str) -> Iterator[Pattern]:
    """Yield the entries of lists, however deep, that are regular expressions and more than a name."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _patterns(value, f"{field}.{key}")
    elif isinstance(tree, list | tuple):
        for item in tree:
            if not isinstance(item, str):
                yield from _patterns(item, field)
            elif not _NAME.fullmatch(item) and _compiles(text := item.removeprefix("re:")):
                yield Pattern(field, item, rf"(?:{text})\.")


def _compiles(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):  # its loader says so
        return False
    return True
