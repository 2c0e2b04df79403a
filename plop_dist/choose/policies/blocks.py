"""Whole blocks, whatever their scores: attention, the MLP, or all candidates."""

from __future__ import annotations

import re

import numpy as np

from plop_dist.choose.policy import Policy
from plop_dist.choose.units import Candidates, Rule
from plop_dist.config.schema import PlacementConfig
from plop_dist.values.scores import Projection

# Of paths in lower case: a pattern that ignores case by itself takes three times as long.
_ATTENTION_PATH = re.compile(r"attn|attention")
_MLP_PATH = re.compile(r"mlp|ffn|feed_?forward|experts?\b|moe|dense_?relu_?dense|intermediate")
_ATTENTION_TYPES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_MLP_TYPES = frozenset({"fc1", "fc2", "fc_in", "fc_out", "up_proj", "gate_proj", "down_proj", "w1", "w2", "w3"})


class All(Policy):
    """Every candidate."""

    name = "all"
    summary = "every candidate, whatever its NFN"
    is_yardstick = True

    def rule(self, candidates: Candidates, config: PlacementConfig) -> Rule:
        """Return the choice of all units."""
        return lambda values_bU: np.ones(values_bU.shape, dtype=bool)

    def sentence(self, config: PlacementConfig) -> str:
        """Return `all candidates`."""
        return "all candidates"


class Attention(All):
    """Every projection of an attention block."""

    name = "attention"
    summary = "every attention projection, whatever its NFN"

    def reason_out(self, module: Projection, config: PlacementConfig) -> str | None:
        """Leave out what is no attention projection."""
        return None if is_attention(module) else "not an attention projection"

    def sentence(self, config: PlacementConfig) -> str:
        """Return `all attention projections`."""
        return "all attention projections"


class Mlp(All):
    """Every projection of a feed-forward block, routed experts included where placement.experts lets them be chosen."""

    name = "mlp"
    summary = "every MLP projection, whatever its NFN; experts where placement.experts is true"

    def reason_out(self, module: Projection, config: PlacementConfig) -> str | None:
        """Leave out what is no MLP projection."""
        return None if is_mlp(module) else "not an MLP projection"

    def sentence(self, config: PlacementConfig) -> str:
        """Return `all MLP projections`."""
        return "all MLP projections"


def is_attention(module: Projection) -> bool:
    """Tell by its path or type whether a projection belongs to an attention block."""
    return module.type in _ATTENTION_TYPES or _ATTENTION_PATH.search(module.fqn.lower()) is not None


def is_mlp(module: Projection) -> bool:
    """Tell by its path or type whether a projection belongs to a feed-forward block, routed experts included."""
    is_of_mlp = module.type in _MLP_TYPES or _MLP_PATH.search(module.fqn.lower()) is not None
    return is_of_mlp and not is_attention(module)


ALL = All()
ATTENTION = Attention()
MLP = Mlp()
