"""Placement -> Tinker's LoraConfig: rank, train_attn, train_mlp, train_unembed.

Each is on or off for every layer. Tinker has no alpha of one's own: it is 32, whatever the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plop_dist.errors import ExportError
from plop_dist.exporters.exporter import Adapted, Language
from plop_dist.exporters.refusals import EVERY_LAYER, RANKS, TOWERS, check_engine, one_rank
from plop_dist.exporters.switches import MLP, read_switches, switched
from plop_dist.exporters.text import python_arguments
from plop_dist.values.placement import Export, Placement

_ALPHA = 32
_SWITCHES = {
    "train_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "train_mlp": (*MLP, *(f"experts.{name}" for name in MLP)),
    "train_unembed": ("lm_head",),
}


class Tinker:
    """Tinker's LoraConfig."""

    name = "tinker"
    summary = "a Python file that defines Tinker's LoraConfig, and the call"
    engines = ("tinker",)
    keys = ("rank", *_SWITCHES)
    matching = "a switch each for attention, the MLP with its experts, and the head"
    limits = (
        RANKS,
        EVERY_LAYER,
        TOWERS,
        "a part of attention or of the MLP (--widen: the whole)",
        f"an alpha other than {_ALPHA} (--widen: {_ALPHA})",
        "types other than those of attention, MLP, experts and the head",
    )
    flags_in: Language = "python"

    def export(self, placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
        """Return a Python file that defines the configuration, and the constructor call.

        Raises ExportError for a part of attention or MLP, single layers and another alpha (unless `widen`), other
        types, and ranks that differ.
        """
        check_engine(engine, self.engines, self.name)
        on, widened, notes = switched(placement, self.name, _SWITCHES, widen)
        ranks = {placement.rank_of(module) for module in placement.chosen}
        rank, alpha, same_rank = one_rank(ranks, placement, self.name, widen)
        call = f"LoraConfig({python_arguments({'rank': rank, **on})})"
        return Export(
            target=self.name,
            files={
                "tinker_lora.py": (
                    '"""The adapters of this run: what create_lora_training_client is given one by one."""\n\n'
                    f"from tinker.types import LoraConfig\n\nlora = {call}\n"
                )
            },
            flags=(call,),
            notes=notes,
            widened=(*widened, *same_rank, *_other_alpha(alpha, widen)),
        )

    def read(self, fields: Mapping[str, Any], placement: Placement, where: str) -> Adapted:
        """Return what Tinker adapts: what its switches say, which are on unless they are given."""
        del where
        on = [name for name in _SWITCHES if fields.get(name, True)]
        return read_switches(placement, int(fields["rank"]), _SWITCHES, on)


EXPORTER = Tinker()


def _other_alpha(alpha: float, widen: bool) -> tuple[str, ...]:
    if alpha == _ALPHA:
        return ()
    if not widen:
        raise ExportError(
            f"tinker takes no alpha: it is {_ALPHA} there, but the placement has alpha {alpha:g}. Nearest choice: "
            f"placement.alpha={_ALPHA}, or that alpha in spite of it (--widen)."
        )
    return (f"alpha is {_ALPHA} instead of {alpha:g}.",)
