"""What a person does with a run: the next step, and what to paste into a trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plop_dist.errors import ExportError
from plop_dist.exporters.exporter import find_exporter
from plop_dist.registry import EXPORTERS, names
from plop_dist.report.closing import command_text
from plop_dist.rundir.layout import RunDir
from plop_dist.values.placement import Placement

_SHOWN = ("peft", "trl")
_MOST_CHARACTERS = 4000  # a list of thousands of modules is pasted from its file


@dataclass(frozen=True)
class Paste:
    """What one target takes: text to paste, or None and the reason in `note`; summary: what it is."""

    target: str
    summary: str
    text: str | None
    note: str
    is_refused: bool = False


@dataclass(frozen=True)
class NextStep:
    """What comes next, in words, and the command or the lines of Python for it."""

    words: str
    text: str


def pastes(placement: Placement) -> list[Paste]:
    """Return what the most usual targets take for this placement."""
    return [_paste(name, placement) for name in _SHOWN]


def other_targets() -> list[str]:
    """Return the names of all other targets that a placement is exported to."""
    return [name for name in names(EXPORTERS) if name not in _SHOWN]


def next_step(
    run_dir: RunDir, placement: Placement | None, pasted: Sequence[Paste], trained: Mapping[str, Any] | None
) -> NextStep:
    """Return what comes next. trained: the summary of a training of this placement, or None."""
    here = run_dir.path
    if placement is None:
        return NextStep("Choose the targets from these scores; no model is needed, it takes seconds:",
                        command_text("place", here))  # fmt: skip
    adapter = None if trained is None else trained.get("adapter")
    if isinstance(adapter, str):
        return NextStep("The adapter of this placement is trained. Load it on the base model:",
                        f"model = peft.PeftModel.from_pretrained(model, {adapter!r})")  # fmt: skip
    target = next((paste.target for paste in reversed(pasted) if not paste.is_refused), None)
    if target is None:
        return NextStep("See which trainers can express this placement, and export it for one of them:",
                        command_text("targets", here))  # fmt: skip
    return NextStep("Write the files of your trainer, and start it with the flags that this prints:",
                    command_text("export", here, "--to", target))  # fmt: skip


def _paste(name: str, placement: Placement) -> Paste:
    exporter = find_exporter(name)
    try:
        export = exporter.export(placement)
    except ExportError as error:
        return Paste(name, exporter.summary, None, str(error), is_refused=True)
    text = "\n".join(export.flags)
    if len(text) > _MOST_CHARACTERS:
        return Paste(name, exporter.summary, None, "Too long to read here: plop-dist export writes it into a file.")
    return Paste(name, exporter.summary, text, " ".join(export.notes))
