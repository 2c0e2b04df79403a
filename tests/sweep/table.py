"""The sweep over every architecture of transformers, in two processes, and the table that it writes.

python -m tests.sweep.table [--backend transformers] [--write] [MODEL_TYPE ...]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import signal
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import plop_dist
from tests.sweep.family import TOLERANCES, Family, Outcome, sweep_family
from tests.sweep.specifications import PUBLISHED_AS, bridge_classes, sweep_specifications

# The heads of a model type in the order in which one is taken: what reads text and is trained on it comes first.
_HEADS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM",
          "SPEECH_SEQ_2_SEQ", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION")  # fmt: skip
_WAYS = {"command": "plop-dist score", "host": "plop_dist.score, PEFT", "local": "Megatron's own layers",
         "transformer_engine": "Transformer Engine's", "tp2_sp": "those at tp 2 with sequence parallelism",
         "pp2": "those at pp 2"}  # fmt: skip
_TIME_LIMIT_S = 120
_CELL = 160


def table_file(backend: str) -> Path:
    """Return where the table of a backend lies."""
    folder = {"transformers": "hf"}.get(backend, backend)
    return Path(plop_dist.__file__).parent / "backends" / folder / "FAMILIES.md"


def architectures() -> dict[str, str]:
    """Return the class that is swept for every model type that has a head for text, in alphabetical order."""
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for head in _HEADS:
        for model_type, names in getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES").items():
            name = names if isinstance(names, str) else names[0]
            if _is_of(name, model_type):
                found.setdefault(model_type, name)
    return dict(sorted(found.items()))


def _is_of(class_name: str, model_type: str) -> bool:
    """Tell whether checkpoints of this type hold the class: Llama 4's language model has a type of its own."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    config_class = getattr(getattr(transformers, class_name), "config_class", None)
    return config_class is None or config_class.__name__ == CONFIG_MAPPING_NAMES[model_type]


def sweep(model_types: Sequence[str] = (), backend: str = "transformers") -> list[Family]:
    """Return a row for each of these model types, or for all."""
    chosen = {name: one for name, one in architectures().items() if not model_types or name in model_types}
    if backend == "megatron":
        types = {class_name: model_type for model_type, class_name in chosen.items()}
        types |= {name: types[built] for name, built in PUBLISHED_AS.items() if built in types}
        missing = {} if model_types else dict.fromkeys(bridge_classes(), "")
        return sweep_specifications({name: types.get(name, "") for name in missing or types})
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, _begin) as pool:
        tasks = [pool.submit(_swept, name, one) for name, one in chosen.items()]
        rows = []
        for task in tasks:
            rows.append(task.result())
            row = rows[-1]
            for way, outcome in row.ways.items():
                if outcome.verdict != "exact":
                    print(f"{outcome.verdict:9} {row.model_type} ({row.class_name}) {way}: {outcome.said}", flush=True)
        return rows


def _begin() -> None:
    """Silence a process, and have what takes too long fail by itself."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    signal.signal(signal.SIGALRM, _too_long)


def _too_long(number: int, frame: Any) -> None:
    raise TimeoutError(f"not done in {_TIME_LIMIT_S} seconds")


def _swept(model_type: str, class_name: str) -> Family:
    signal.alarm(_TIME_LIMIT_S)
    with tempfile.TemporaryDirectory() as folder:
        return sweep_family(model_type, class_name, Path(folder))


def markdown(rows: Sequence[Family], backend: str = "transformers") -> str:
    """Return the table for people."""
    counts = Counter((way, outcome.verdict) for row in rows for way, outcome in row.ways.items())
    built = [row for row in rows if "" not in row.ways]
    ways = [way for way in _WAYS if any(way in row.ways for row in built)]
    head = " | ".join(_WAYS[way] for way in ways)
    what = "every family of Megatron-Bridge" if backend == "megatron" else "every architecture of transformers"
    lines = [
        f"# What becomes of {what} under `parallel.backend={backend}`",
        "",
        f"Written by `python -m tests.sweep.table --backend {backend} --write`; {_version(backend)}.",
        "A tiny random model of each model type is saved and scored, and held to a reference in float64 that hooks",
        f"nothing: *exact* is within {TOLERANCES[backend]:g} in gains and baselines, every weight that multiplies",
        "activations scored or named as one that is not; the worst gain stands beside it.",
        "",
        *(f"- {_WAYS[way]}: {_sum(counts, way)}" for way in ways),
        "",
        f"| model type | class | {head} |",
        f"|{' --- |' * (2 + len(ways))}",
        *(f"| {row.model_type} | {row.class_name} | {_cells(row, ways)} |" for row in built),
    ]
    not_built = [f"- {row.model_type}: {_shortened(row.ways[''].said)}" for row in rows if "" in row.ways]
    if not_built:
        why = "transformers refuses the small configuration, needs another package, or the model fails by itself."
        lines += ["", f"Not built: {why}", "", *not_built]
    return "\n".join(lines) + "\n"


def _sum(counts: Counter[tuple[str, str]], way: str) -> str:
    verdicts = ("exact", "refused", "wrong", "crashed")
    return ", ".join(f"{counts[way, verdict]} {verdict}" for verdict in verdicts if counts[way, verdict])


def _cells(row: Family, ways: Sequence[str]) -> str:
    return " | ".join(_cell(row.ways[way]) if way in row.ways else "" for way in ways)


def _cell(outcome: Outcome) -> str:
    if outcome.verdict == "exact" and outcome.worst_gain is not None:
        return f"exact ({outcome.worst_gain:.0e})"
    return outcome.verdict + (f": {_shortened(outcome.said)}" if outcome.said else "")


def _version(backend: str) -> str:
    packages = ["transformers", *(["megatron-core", "megatron-bridge"] if backend == "megatron" else [])]
    return ", ".join(f"{package} {version(package)}" for package in packages)


def _shortened(said: str) -> str:
    """Return what was said without places of this run, in a cell's length."""
    text = re.sub(r"model\.name_or_path '[^']*'(: |'s | )", "", re.sub(r"^\w+: ", "", said))
    text = re.sub(r"<class '[^']*\.(\w+)'>", r"\1", text).replace("|", "/")
    return text if len(text) <= _CELL else f"{text[:_CELL].rpartition(' ')[0]} ..."


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="transformers")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("model_types", nargs="*")
    given = parser.parse_args()
    swept = sweep(given.model_types, given.backend)
    print(Counter((way, outcome.verdict) for row in swept for way, outcome in row.ways.items()))
    if given.write:
        table_file(given.backend).write_text(markdown(swept, given.backend))
