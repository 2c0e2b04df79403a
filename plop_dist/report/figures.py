"""The charts as Plotly figures in plain dictionaries; colours are CSS variables that the page fills in per theme."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from plop_dist.choose.place import ordered_types
from plop_dist.choose.sweep import Sweep
from plop_dist.values.placement import Placement
from plop_dist.values.scores import ModuleScore, Scores

Figure = dict[str, Any]

_CHOSEN, _OTHER, _LINE = "var(--accent)", "var(--muted)", "var(--soft)"


def types_figure(scores: Scores, placement: Placement | None) -> Figure:
    """Return NFN per type with 95% intervals, lowest at the top, the chosen ones in the accent colour."""
    entries = {entry.type: entry for entry in scores.types}
    ordered = [entries[name] for name in ordered_types(scores)]
    chosen = set(placement.module_types) if placement is not None else set()
    bars: Figure = {
        "type": "bar",
        "orientation": "h",
        "y": [_safe(entry.type) for entry in ordered],
        "x": [entry.nfn for entry in ordered],
        "marker": {"color": [_CHOSEN if entry.type in chosen else _OTHER for entry in ordered]},
        "hovertemplate": "%{y}: NFN %{x:.4f}<extra></extra>",
    }
    if any(entry.nfn_ci95 for entry in ordered):
        bars["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": [entry.nfn_ci95[1] - entry.nfn if entry.nfn_ci95 else 0 for entry in ordered],
            "arrayminus": [entry.nfn - entry.nfn_ci95[0] if entry.nfn_ci95 else 0 for entry in ordered],
            "color": "var(--text)",
            "thickness": 1.2,
        }
    layout = {
        "height": 120 + 34 * len(ordered),
        "xaxis": {"title": {"text": "NFN"}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "automargin": True},
        "shapes": [{"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper", "line": _dotted()}],
    }
    return {"data": [bars], "layout": layout}


def heatmap_figure(scores: Scores) -> Figure:
    """Return NFN by layer and type; a cell with several modules (experts) shows their mean."""
    cells: dict[tuple[str, str], list[ModuleScore]] = defaultdict(list)
    layers = sorted({-1 if module.layer is None else module.layer for module in scores.modules})
    for module in scores.modules:
        cells[module.type, _layer_name(-1 if module.layer is None else module.layer)].append(module)
    types, columns = ordered_types(scores), [_layer_name(layer) for layer in layers]
    values = [[_mean([m.nfn for m in cells.get((name, column), [])]) for column in columns] for name in types]
    texts = [[_cell_text(cells.get((name, column), [])) for column in columns] for name in types]
    heat: Figure = {
        "type": "heatmap",
        "x": columns,
        "y": [_safe(name) for name in types],
        "z": values,
        "text": texts,
        "hovertemplate": "%{text}<extra></extra>",
        "hoverongaps": False,
        "colorscale": "Viridis",
        "reversescale": True,
        "colorbar": {"title": {"text": "NFN"}, "thickness": 12},
        "xgap": 1,
        "ygap": 1,
    }
    layout = {
        "height": 140 + 30 * len(types),
        "xaxis": {"title": {"text": "layer"}, "type": "category"},
        "yaxis": {"autorange": "reversed", "automargin": True},
    }
    return {"data": [heat], "layout": layout}


def samples_figure(sweep: Sweep) -> Figure:
    """Return how often so many samples make the final choice."""
    line = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [entry.num_samples for entry in sweep.by_samples],
        "y": [entry.agreement for entry in sweep.by_samples],
        "line": {"color": _CHOSEN},
        "hovertemplate": "%{x} samples: %{y:.1%}<extra></extra>",
    }
    axes = {
        "xaxis": {"title": {"text": "samples"}, "type": "log"},
        "yaxis": {"title": {"text": "P(final choice)"}, "range": [0, 1.05], "tickformat": ".0%"},
    }
    return {"data": [line], "layout": {"height": 300, **axes}}


def training_figure(log: Sequence[Mapping[str, Any]], key: str, title: str, held_out: bool = False) -> Figure | None:
    """Return one logged quantity over the steps (with the held-out loss if asked), or None if it was never logged."""
    lines = []
    wanted = [(key, title, _CHOSEN)] + ([("held_out_loss", "held-out loss", "var(--second)")] if held_out else [])
    for name, label, colour in wanted:
        points = [(entry["step"], entry[name]) for entry in log if _is_number(entry.get(name)) and "step" in entry]
        if points:
            lines.append(_trace(label, [x for x, _ in points], [y for _, y in points], {"color": colour}))
    return _over_steps(lines, title)


def tracked_nfn_figure(log: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Return the NFN of each type of the adapted model over the steps, or None if it was not tracked."""
    points: dict[str, list[tuple[Any, float]]] = defaultdict(list)
    for entry in log:
        nfn = entry.get("nfn")
        if isinstance(nfn, Mapping) and "step" in entry:
            for name, value in nfn.items():
                if _is_number(value):
                    points[str(name)].append((entry["step"], value))
    return _over_steps([_trace(_safe(n), [x for x, _ in p], [y for _, y in p], {}) for n, p in points.items()], "NFN")


def _over_steps(lines: list[Figure], title: str) -> Figure | None:
    if not lines:
        return None
    axes = {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": title}}}
    return {"data": lines, "layout": {"height": 320, "showlegend": len(lines) > 1, **axes}}


def _trace(name: str, x: list[Any], y: list[Any], line: Figure) -> Figure:
    mode = "lines+markers" if len(x) < 30 else "lines"
    return {"type": "scatter", "mode": mode, "name": name, "x": x, "y": y, "line": line}


def _cell_text(modules: Sequence[ModuleScore]) -> str:
    if not modules:
        return ""
    tokens = sum(module.num_tokens for module in modules)
    name = _safe(modules[0].fqn) if len(modules) == 1 else f"{len(modules)} modules, from {_safe(modules[0].fqn)}"
    return (
        f"{name}<br>NFN {_mean([m.nfn for m in modules]):.4f}<br>gain {_mean([m.gain for m in modules]):.4g}"
        f"<br>baseline {_mean([m.baseline for m in modules]):.4g}<br>{tokens:,} tokens"
    )


def _layer_name(layer: int) -> str:
    return "outside" if layer < 0 else str(layer)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _dotted() -> Figure:
    return {"color": _LINE, "dash": "dot", "width": 1.5}


def _safe(text: str) -> str:
    # Plotly reads a subset of HTML in labels.
    return html.escape(text)
