"""What a module's path says: its type, its layer, and whether it is a routed expert.

Types are the last path component (`q_proj`), which is what PEFT and every framework built on it match on. Routed
experts form types of their own (`experts.down_proj`), because frameworks address them differently from a dense or
shared MLP and their scores rest on other tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")
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
        if part.isdigit():
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
    regex = "".join(".*" if part == "*" else re.escape(part) for part in re.split(r"(\*)", pattern))
    return re.fullmatch(rf"(?:.*\.)?{regex}", fqn) is not None


def natural_key(fqn: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that puts layer 2 before layer 10; total and the same on every machine."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in fqn.split("."))


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
