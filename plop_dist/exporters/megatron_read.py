"""What target names of Megatron adapt in the scored model, fused (LoRA) or in parts (CanonicalLoRA)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from plop_dist.exporters.exporter import Adapted
from plop_dist.exporters.holders import known_projections
from plop_dist.exporters.megatron_targets import PLACES, is_latent, linear_key, megatron_name
from plop_dist.exporters.names_read import found_by, in_fused
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Projection


def read_megatron(names: Sequence[str], rank: int, placement: Placement, *, is_canonical: bool) -> Adapted:
    """Return what Bridge's matcher adapts: a linear's own name, or with * a pattern of its path.

    Under LoRA a fused linear is one adapter for all of its parts.
    """
    known = known_projections(placement)
    latent = is_latent(known)
    regexes = {name: re.compile(name.replace("*", ".*")) for name in names if "*" in name}

    @cache
    def path_of(key: tuple[str, str, int | None], own: str) -> str:
        _, place, layer = key
        expert = "local_experts.0." if place == "experts" else ""
        return f"decoder.layers.{layer}.{PLACES[place]}.{expert}{own}"

    def matches(name: str, item: Projection) -> bool:
        in_megatron = megatron_name(item, latent)
        if in_megatron is None:
            return False
        own = in_megatron[1] if is_canonical else in_megatron[0]
        if name in regexes:
            return bool(regexes[name].fullmatch(path_of(linear_key(item, in_megatron[0]), own)))
        return name == own

    found = found_by(placement, rank, names, matches)
    if is_canonical:
        return found
    linears = {
        item.fqn: (names_[0], linear_key(item, names_[0])) for item in known if (names_ := megatron_name(item, latent))
    }
    parts = Counter((linears[item.fqn][1], item.type) for item in known if item.fqn in linears)
    several = Counter(key for key, _ in parts)
    held = {item.fqn: in_fused(item, linears[item.fqn][0]) for item in known
            if item.fqn in found.ranks and several[linears[item.fqn][1]] > 1 and item.storage == "linear"}  # fmt: skip
    return replace(found, held=held)
