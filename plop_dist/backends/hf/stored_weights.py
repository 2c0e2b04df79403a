"""Whether a model's folder holds every weight that the model needs, by its files' headers: no weight is read.

transformers renames and joins tensors while it loads (a prefix more or less, experts into one 3-D parameter, tied
weights), each family in its own way. So transformers itself is asked: it loads a state dict of tensors without values
into a model without memory, and says what was missing.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from plop_dist.backends.hf.silence import unheard
from plop_dist.checkpoints.builtin import resolve
from plop_dist.checkpoints.safetensors_headers import INDEX_FILE, PICKLED, WEIGHTS_FILE, StoredTensor, read_headers
from plop_dist.config.schema import ModelConfig
from plop_dist.errors import ModelError, first_line
from plop_dist.values.names import natural_key

_MAX_NAMED = 3


@dataclass
class Difference:
    """What transformers says of a state dict: weights it misses or cannot put together, of other shapes, and left over.

    misshaped: name -> (shape in the files, shape in the model).
    """

    missing: set[str] = field(default_factory=set)
    misshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    unexpected: set[str] = field(default_factory=set)


def check_stored_weights(model: ModelConfig, twin: torch.nn.Module) -> tuple[str, ...]:
    """Return notes on the weights in a local model folder, e.g. tensors that the model has no place for.

    twin: the model on the meta device. Raises ModelError naming weights that are missing or of another shape, and
    files that are missing or cut off. Ids on a hub, and weights from model.checkpoint, are not looked at.
    """
    folder = Path(resolve(model.name_or_path))
    if model.checkpoint is not None or not folder.is_dir():
        return ()
    headers = read_headers(folder)
    if headers is None:
        pickled = next((name for name in PICKLED if (folder / name).is_file()), None)
        if pickled is None:
            return (f"No weights beside config.json ({WEIGHTS_FILE} or {INDEX_FILE}); scoring needs them.",)
        return (_unknown(f"{pickled} cannot be looked at without loading it"),)
    config: Any = twin.config
    if getattr(config, "quantization_config", None):
        return (_unknown("quantised ones are not compared with the model"),)
    try:
        found = compare(twin, headers)
    except Exception as error:  # a model's own code may do anything here; scoring will show whether it loads
        return (_unknown(f"transformers does not say ({type(error).__name__}: {first_line(error)})"),)
    if found.missing or found.misshaped:
        raise ModelError(_message(model.name_or_path, found, headers))
    if not found.unexpected:
        return ()
    return (f"The model has no place for {_counted(found.unexpected, 'tensor')} of the files.",)


def compare(twin: torch.nn.Module, headers: Mapping[str, StoredTensor]) -> Difference:
    """Return what transformers finds wrong with these tensors as the weights of `twin`; nothing is allocated."""
    found = Difference()
    model_class: Any = _class_without_memory(type(twin), found)
    with unheard():
        model_class.from_pretrained(
            None,
            config=copy.deepcopy(twin.config),
            state_dict={name: _StoredSlice(stored.shape) for name, stored in headers.items()},
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
        )
    return found


def _class_without_memory(model_class: Any, found: Difference) -> Any:
    """Return the class whose models stay on the meta device, and which writes into `found` instead of logging."""

    def note(self: Any, loading_info: Any) -> None:
        model_class._adjust_missing_and_unexpected_keys(self, loading_info)
        found.missing |= loading_info.missing_keys
        found.unexpected |= loading_info.unexpected_keys
        found.misshaped |= {name: (tuple(ours), tuple(its)) for name, ours, its in loading_info.mismatched_keys}
        # What could not be put together is among the missing; transformers would log it with a traceback, and raise.
        for said in (loading_info.conversion_errors, loading_info.unexpected_keys, loading_info.mismatched_keys):
            said.clear()
        loading_info.missing_keys = set()

    def tie(self: Any, missing_keys: set[str] | None = None, **options: Any) -> None:
        if missing_keys is not None:
            # transformers 5.12 would compare the values of two that are both there; then neither is missing.
            tied = self.all_tied_weights_keys
            self.all_tied_weights_keys = {name: tied[name] for name in tied if {name, tied[name]} & missing_keys}
        model_class.tie_weights(self, missing_keys, **options)

    fields = {
        "__module__": model_class.__module__,
        "tie_weights": tie,
        "_move_missing_keys_from_meta_to_device": lambda self, *args, **kwargs: None,
        "_initialize_missing_keys": lambda self, *args, **kwargs: None,
        "_adjust_missing_and_unexpected_keys": note,
    }
    # Under its own name, by which transformers looks up what it renames.
    return type(model_class.__name__, (model_class,), fields)


class _StoredSlice:
    """Stands for safetensors' slice of a file, which transformers reads with [...]; gives tensors without values."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: Any) -> _StoredSlice:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(self.shape, dtype=dtype or torch.float32, device="meta")


def _message(name: str, found: Difference, headers: Mapping[str, StoredTensor]) -> str:
    parts = []
    if found.missing:
        parts.append(f"has no weights for {_counted(found.missing, 'parameter')}")
    if found.misshaped:
        path = min(found.misshaped, key=natural_key)
        ours, its = found.misshaped[path]
        parts.append(
            f"has {len(found.misshaped)} weight{'s' * (len(found.misshaped) > 1)} of another shape than its "
            f"config.json says, e.g. '{path}' {list(ours)} instead of {list(its)}"
        )
    gaps = _gaps(headers)
    where = f" Its files lack {_counted(gaps, 'tensor')}." if gaps else ""
    return f"model.name_or_path '{name}' {' and '.join(parts)}.{where} Point it at a complete checkpoint of this model."


def _gaps(headers: Iterable[str]) -> set[str]:
    """Return the names that are absent beside their like: one of the experts that the layer has by other names."""
    known = set(headers)
    split = [match.groups() for name in known if (match := re.fullmatch(r"(.*\.)(\d+)(\.[^\d].*)", name))]
    numbers: dict[str, set[str]] = {}
    endings: dict[str, set[str]] = {}
    for before, number, after in split:
        if "expert" in before:
            numbers.setdefault(before, set()).add(number)
            endings.setdefault(before, set()).add(after)
    wanted = {before + number + after for before in numbers for number in numbers[before] for after in endings[before]}
    return wanted - known


def _counted(names: Iterable[str], noun: str) -> str:
    ordered = sorted(names, key=natural_key)
    shown = ", ".join(f"'{name}'" for name in ordered[:_MAX_NAMED])
    return f"{len(ordered)} {noun}{'s' * (len(ordered) != 1)}, {'e.g. ' * (len(ordered) > _MAX_NAMED)}{shown}"


def _unknown(reason: str) -> str:
    return f"Whether the weights are complete is not known: {reason}."
