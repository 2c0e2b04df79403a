"""What the report says of the training: its summary in words, its curves, and whether it is that of the placement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plop_dist.report.axes import is_number
from plop_dist.report.panels import Panel, tracked_nfn_panel, training_panel
from plop_dist.rundir.layout import RunDir
from plop_dist.rundir.trained import read_trained
from plop_dist.rundir.training_log import read_log

# Title of a panel -> what of the log it shows, by label; TRL's names
_REWARDED = {
    "reward": {"reward": "reward"},
    "entropy per token of completions": {"entropy": "entropy"},
    "KL to the model without adapters, per token": {"kl": "KL"},
    "share of tokens whose ratio is clipped": {
        "clip_ratio/low_mean": "too low",
        "clip_ratio/high_mean": "too high",
        "cispo_clip_ratio": "too high (cispo)",
    },
    "log-probability of a token: sampler against trainer": {
        "sampling/sampling_logp_difference/mean": "mean difference",
        "sampling/sampling_logp_difference/max": "largest difference",
    },
    "importance weights of completions: trainer to sampler": {
        "sampling/importance_sampling_ratio/min": "lowest",
        "sampling/importance_sampling_ratio/mean": "mean",
        "sampling/importance_sampling_ratio/max": "highest",
    },
}


@dataclass(frozen=True)
class Training:
    """The training of this placement: summary, or None; panels: its curves.

    held_out_label: what the held-out losses are of; num_unreadable: lines of the log.
    """

    summary: Mapping[str, Any] | None
    panels: tuple[Panel, ...]
    held_out_label: str
    num_unreadable: int


def training_of(run_dir: RunDir) -> Training:
    """Return what the page says of the training; nothing of one that belongs to an earlier placement."""
    trained = read_trained(run_dir)
    log, num_unreadable = read_log(run_dir.training_log)
    if trained is not None and not trained.is_of_placement:
        return Training(None, (), "", 0)
    summary = None if trained is None else {k: v for k, v in trained.summary.items() if k != "placement"}
    labels = {"loss": "training loss", "held_out_loss": "held-out loss"}
    panels = (
        training_panel([*log, *_held_out(summary)], labels, _loss_title(summary)),
        *(training_panel(log, labels, title) for title, labels in _REWARDED.items()),
        tracked_nfn_panel(log),
    )
    drawn = tuple(panel for panel in panels if panel is not None)
    return Training(summary, drawn, _held_out_label(summary), num_unreadable)


def _loss_title(summary: Mapping[str, Any] | None) -> str:
    counts = _counts(summary)
    return f"loss ({', '.join(counts)})" if counts else "loss"


def _held_out_label(summary: Mapping[str, Any] | None) -> str:
    held_out = (summary or {}).get("num_held_out_rows")
    return f"held-out loss, {held_out:,} rows" if is_number(held_out) else "held-out loss"


def _counts(summary: Mapping[str, Any] | None) -> list[str]:
    """Return on how much a training's losses rest: rows, epochs and held-out rows, as far as its summary says."""
    found = summary or {}
    rows, epochs, held_out = (found.get(name) for name in ("num_rows", "num_epochs", "num_held_out_rows"))
    return [
        *([f"{rows:,} rows"] if is_number(rows) else []),
        *([f"{epochs:.3g} epochs"] if is_number(epochs) else []),
        *([f"{held_out:,} held-out rows"] if is_number(held_out) else []),
    ]


def _held_out(summary: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the held-out losses before and after training as entries of a log."""
    if summary is None:
        return []
    at = {0: "held_out_before", summary.get("num_steps"): "held_out_after"}
    return [{"step": step, "held_out_loss": summary.get(name)} for step, name in at.items()]
