"""The charts as Plotly figures in plain dictionaries; colours are CSS variables that the page fills in per theme."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from plop_dist.choose.place import ordered_types
from plop_dist.choose.sweep import Sweep
from plop_dist.report.spread import FoldedType, Spread, cells, spread_of
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Scores

Figure = dict[str, Any]

_MOST_POINTS = 1000

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
    """Return NFN by layer and type; a cell with several modules (experts) shows their mean, and tells their spread."""
    found = {cell: spread_of(modules) for cell, modules in cells(scores).items()}
    types, layers = ordered_types(scores), sorted({layer for _, layer in found})
    rows = [[found.get((name, layer)) for layer in layers] for name in types]
    heat: Figure = {
        "type": "heatmap",
        "x": [_layer_name(layer) for layer in layers],
        "y": [_safe(name) for name in types],
        "z": [[None if spread is None else spread.nfn for spread in row] for row in rows],
        "text": [["" if spread is None else _cell_text(spread) for spread in row] for row in rows],
        "hovertemplate": "%{text}<extra></extra>",
        "hoverongaps": False,
        "colorscale": "Viridis",
        "reversescale": True,
        "colorbar": {"title": {"text": "NFN"}, "thickness": 12},
        "xgap": 1 if len(layers) <= 48 else 0,
        "ygap": 1,
    }
    layout = {
        "height": 140 + 30 * len(types),
        "xaxis": {"title": {"text": "layer"}, "type": "category", "tickangle": 0, "nticks": 8, "automargin": True},
        "yaxis": {"autorange": "reversed", "automargin": True},
    }
    return {"data": [heat], "layout": layout}


def folded_figure(types: Sequence[FoldedType]) -> Figure | None:
    """Return a strip for each type that has many modules in a layer: where these lie in each layer; None for none."""
    if not types:
        return None
    traces, notes = [], []
    layout: Figure = {"height": 60 + 190 * len(types), "showlegend": False, "annotations": notes}
    room = 1 / len(types)
    for index, entry in enumerate(types):
        suffix, top = "" if index == 0 else str(index + 1), 1 - index * room
        is_last = index == len(types) - 1
        layout[f"xaxis{suffix}"] = {
            "anchor": f"y{suffix}", "matches": "x", "showticklabels": is_last,
            "title": {"text": "layer" if is_last else ""},
        }  # fmt: skip
        layout[f"yaxis{suffix}"] = {"domain": [top - 0.8 * room, top], "title": {"text": "NFN"}}
        at = {"xref": "paper", "yref": "paper", "x": 0, "y": top, "xanchor": "left", "yanchor": "bottom"}
        notes.append({"text": f"<b>{_safe(entry.type)}</b>", "showarrow": False, **at})
        traces += [{**trace, "xaxis": f"x{suffix}", "yaxis": f"y{suffix}"} for trace in _strip(entry)]
    return {"data": traces, "layout": layout}


def _strip(entry: FoldedType) -> list[Figure]:
    spreads = list(entry.by_layer.values())
    x = [_layer_name(layer) if layer < 0 else layer for layer in entry.by_layer]
    quiet = {"type": "scatter", "x": x, "hoverinfo": "skip"}
    edges = [{**quiet, "mode": "lines", "line": {"width": 0}, "y": [s.quantiles[i] for s in spreads]} for i in range(5)]
    ends = [[spread.lowest.nfn for spread in spreads], [spread.highest.nfn for spread in spreads]]
    return [
        edges[0],
        {**edges[4], "fill": "tonexty", "fillcolor": "var(--band)"},
        edges[1],
        {**edges[3], "fill": "tonexty", "fillcolor": "var(--core)"},
        *({**quiet, "mode": "markers", "marker": {"size": 3, "color": _OTHER}, "y": y} for y in ends),
        {
            "type": "scatter",
            "mode": "lines",
            "x": x,
            "y": [spread.quantiles[2] for spread in spreads],
            "line": {"color": _CHOSEN, "width": 2},
            "text": [_cell_text(spread) for spread in spreads],
            "hovertemplate": "layer %{x}<br>%{text}<extra></extra>",
        },
    ]


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
    if len(x) > _MOST_POINTS:  # more than a screen has dots; the last one stays
        step = -(-len(x) // _MOST_POINTS)
        x, y = x[::-step][::-1], y[::-step][::-1]
    mode = "lines+markers" if len(x) < 30 else "lines"
    return {"type": "scatter", "mode": mode, "name": name, "x": x, "y": y, "line": line}


def _cell_text(spread: Spread) -> str:
    means = (
        f"NFN {spread.nfn:.4f}<br>gain {spread.gain:.4g}<br>baseline {spread.baseline:.4g}"
        f"<br>{spread.num_tokens:,} tokens"
    )
    if spread.num_modules == 1:
        return f"{_safe(spread.lowest.fqn)}<br>{means}"
    low, median, high = (spread.quantiles[index] for index in (0, 2, 4))
    return (
        f"{spread.num_modules} modules, on average:<br>{means}"
        f"<br>median {median:.4f}, 5% to 95%: {low:.4f} to {high:.4f}"
        f"<br>lowest {spread.lowest.nfn:.4f}: {_safe(spread.lowest.fqn)}"
        f"<br>highest {spread.highest.nfn:.4f}: {_safe(spread.highest.fqn)}"
    )


def _layer_name(layer: int) -> str:
    return "outside" if layer < 0 else str(layer)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _dotted() -> Figure:
    return {"color": _LINE, "dash": "dot", "width": 1.5}


def _safe(text: str) -> str:
    # Plotly reads a subset of HTML in labels.
    return html.escape(text)
