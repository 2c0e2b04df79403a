"""Placement -> OpenRLHF's flags: --ds.lora.target_modules, --ds.lora.rank, --ds.lora.alpha (PEFT underneath)."""

from __future__ import annotations

from plop_dist.exporters.peft import count_note
from plop_dist.exporters.targets import (
    check_engine,
    hugging_face_targets,
    refuse_parameters,
    uniform_rank,
    whole_number,
)
from plop_dist.exporters.text import shell_flags
from plop_dist.values.placement import Export, Placement


def export(placement: Placement, *, engine: str | None = None, widen: bool = False) -> Export:
    """Return the flags, and a file of arguments to append to the command.

    Raises ExportError for ranks that differ, a part of a fused linear, or experts kept as 3-D parameters.
    """
    check_engine(engine, ("openrlhf",), "openrlhf")
    targets = hugging_face_targets(placement, "openrlhf", widen)
    refuse_parameters(targets, "openrlhf")
    rank, alpha, widened = uniform_rank(targets, placement, "openrlhf", widen)
    flags = shell_flags(
        {
            "ds.lora.rank": rank,
            "ds.lora.alpha": whole_number(alpha, "openrlhf"),
            "ds.lora.target_modules": list(targets.modules),
        }
    )
    return Export(
        target="openrlhf",
        files={"openrlhf.args": "\n".join(flags) + "\n"},
        flags=flags,
        notes=(*targets.notes, *count_note(placement, targets)),
        widened=(*targets.widened, *widened),
    )
