"""What each target can make of a placement: all of it, more of it with --widen, or nothing, and why. Writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plop_dist.errors import ExportError, PlopError, first_line
from plop_dist.exporters.exporter import Exporter, every_exporter
from plop_dist.values.placement import Placement

Verdict = Literal["exact", "with --widen", "refused", "failed"]


@dataclass(frozen=True)
class Fit:
    """What one target, under one of its engines, makes of a placement.

    reasons: what is adapted beyond it with --widen, or why it is refused; `failed` is an exporter's own mistake.
    """

    target: str
    engine: str
    verdict: Verdict
    reasons: tuple[str, ...] = ()


def fits(placement: Placement) -> tuple[Fit, ...]:
    """Return what every target makes of a placement, under each of its engines: rows for people to choose from.

    Raises ConfigError for another package's exporter that cannot be imported.
    """
    return tuple(fit(exporter, engine, placement) for exporter in every_exporter() for engine in exporter.engines)


def fit(exporter: Exporter, engine: str, placement: Placement) -> Fit:
    """Return what one target makes of a placement under one of its engines."""
    try:
        exporter.export(placement, engine=engine)
        return Fit(exporter.name, engine, "exact")
    except ExportError as error:
        refusal = str(error)
    except Exception as error:
        return _failed(exporter, engine, error)
    try:
        widened = exporter.export(placement, engine=engine, widen=True).widened
        return Fit(exporter.name, engine, "with --widen", widened or (refusal,))
    except ExportError as error:
        return Fit(exporter.name, engine, "refused", (str(error),))
    except Exception as error:
        return _failed(exporter, engine, error)


def _failed(exporter: Exporter, engine: str, error: Exception) -> Fit:
    if isinstance(error, PlopError):  # the placement has no scores beside it: nobody can export it
        raise error
    return Fit(exporter.name, engine, "failed", (f"{type(error).__name__}: {first_line(error)}.",))
