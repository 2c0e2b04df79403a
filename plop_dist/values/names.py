"""What a module's path says: its type, its layer, and whether it is a routed expert.

Types are the last path component (`q_proj`), which is what PEFT and every framework built on it match on. Routed
experts form types of their own (`experts.down_proj`), because frameworks address them differently from a dense or
shared MLP and their scores rest on other tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

# Nine digits at most: paths also come from files, and int() refuses thousands of them.
_EXPERT = re.compile(r"(?:^|\.)experts\.(\d{1,9})\.")
_NUMBER = re.compile(r"\d{1,9}")
_WRAPPER = re.compile(r"(?:^|\.)(?:_orig_mod|_checkpoint_wrapped_module)(?=\.|$)")


def unwrapped(path: str) -> str:
    """Return a path without what torch.compile and checkpoint_wrapper put between a module and its parent.

    >>> unwrapped("model.layers.0._orig_mod.mlp.up_proj")
    'model.layers.0.mlp.up_proj'
    """
    return _WRAPPER.sub("", path).removeprefix(".")


def module_type(fqn: str) -> str:
    """Return the module type of a path.

    >>> module_type("model.layers.3.self_attn.q_proj")
    'q_proj'
    >>> module_type("model.layers.3.mlp.experts.17.up_proj")
    'experts.up_proj'
    >>> module_type("encoder.block.1.mlp.0")
    'mlp.0'
    >>> module_type("model.layers.1.adapters.0.1")
    'adapters.0.1'
    """
    parts = fqn.split(".")
    start = max((i for i, part in enumerate(parts) if not part.isdigit()), default=0)
    name = ".".join(parts[start:])
    return f"experts.{name}" if _EXPERT.search(fqn) else name


def layer_index(fqn: str) -> int | None:
    """Return the index of the layer a path lies in: its first whole-number component, or None outside the layers.

    >>> layer_index("model.layers.12.mlp.experts.3.up_proj")
    12
    >>> layer_index("lm_head") is None
    True
    """
    for part in fqn.split(".")[:-1]:
        if _NUMBER.fullmatch(part):
            return int(part)
    return None


def expert_index(fqn: str) -> int | None:
    """Return the index of the routed expert a path lies in, or None.

    >>> expert_index("model.layers.0.mlp.experts.7.gate_proj")
    7
    """
    match = _EXPERT.search(fqn)
    return int(match.group(1)) if match else None


def path_matches(fqn: str, pattern: str) -> bool:
    """Tell whether a dotted pattern names this path: whole, as a dotted suffix, or with `*` for any characters.

    A bare type never matches a part of a component: `up_proj` does not match `gate_up_proj`, `layers.1` does not
    match `layers.10`.

    >>> path_matches("layers.1.mlp.up_proj", "up_proj"), path_matches("layers.1.mlp.gate_up_proj", "up_proj")
    (True, False)
    >>> path_matches("model.layers.10.mlp.up_proj", "*.layers.1.*")
    False
    """
    return _compiled(pattern).fullmatch(fqn) is not None


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    # What lies between two stars is taken where it first comes, and never looked for again (atomic groups): with plain
    # `.*` a pattern of many stars would try every way to share a path out between them.
    whole, *rest = (re.escape(part) for part in re.split(r"\*+", pattern))
    if rest:
        whole += "".join(f"(?>.*?{part})" for part in rest[:-1]) + f".*{rest[-1]}"
    return re.compile(rf"(?:.*\.)?{whole}")


class NameList:
    """Entries that name projections by type, path, dotted suffix or pattern (`*`), looked up in one go.

    What a projection costs does not grow with the number of entries, except of those that hold a `*`.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self.entries = tuple(dict.fromkeys(entries))
        self._position = {entry: position for position, entry in enumerate(self.entries)}
        self._num_parts = sorted({entry.count(".") + 1 for entry in self.entries})
        self._patterns = [entry for entry in self.entries if "*" in entry]

    def all(self, type_: str, fqn: str) -> set[str]:
        """Return the entries that name a projection.

        >>> sorted(NameList(["q_proj", "mlp.up_proj", "mlp.*"]).all("up_proj", "layers.0.mlp.up_proj"))
        ['mlp.*', 'mlp.up_proj']
        """
        found = {type_, fqn} & self._position.keys()
        for num in self._num_parts:
            suffix = ".".join(fqn.rsplit(".", num)[-num:])
            if suffix in self._position:
                found.add(suffix)
        if self._patterns:
            found.update(entry for entry in self._patterns if path_matches(fqn, entry))
        return found

    def first(self, type_: str, fqn: str) -> str | None:
        """Return the first entry that names a projection, or None."""
        found = self.all(type_, fqn) if self.entries else None
        return min(found, key=self._position.__getitem__) if found else None


def natural_key(fqn: str) -> str:
    """Return a sort key that puts layer 2 before layer 10, and numbers before names; the same on every machine.

    >>> sorted(["h.10.a", "h.2.a", "h.b", "h"], key=natural_key)
    ['h', 'h.2.a', 'h.10.a', 'h.b']
    """
    return "\0".join(map(_component_key, fqn.split(".")))


@lru_cache(maxsize=1 << 14)
def _component_key(part: str) -> str:
    if not (part.isascii() and part.isdigit()):
        return f"1{part}"
    digits = part.lstrip("0")
    return f"0{len(digits):04d}{digits}"


def common_prefix(fqns: Iterable[str]) -> str:
    """Return the longest dotted prefix that all paths share, without a trailing dot."""
    paths = [fqn.split(".")[:-1] for fqn in fqns]
    if not paths:
        return ""
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
