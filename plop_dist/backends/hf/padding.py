"""Whether a model's tokens see the padding, or the packed samples, in their row: found out by computing on few layers.

The copy has the model's class and widths, one layer of each kind, float32, and random weights whose rows overlap in
memory, so that it costs next to none. Each of its rows is scored alone, and beside or behind a longer one.
"""

# O out_features, I in_features, E experts

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from plop_dist.backends.hf.built_whole import unpartitioned
from plop_dist.backends.hf.experts import find_expert_sites
from plop_dist.backends.hf.linears import find_linears
from plop_dist.backends.hf.own_modules import named_modules
from plop_dist.backends.hf.silence import unheard
from plop_dist.backends.hf.sites import LinearSite
from plop_dist.measure.collector import Collector
from plop_dist.measure.protocols import MicroBatch, ScorableModel, Site

log = logging.getLogger(__name__)

AsScorable = Callable[[nn.Module, Sequence[Site]], ScorableModel]
Arrange = Callable[[Sequence[Tensor]], MicroBatch]  # of rows of ids

TIMES_NOISE = 10.0
_LEAST = 1e-6  # where two batch shapes give the same bits, rounding is still no difference
_MAX_LAYERS = 4
_ROW_STEP = 13  # by which rows of the weights are displaced against each other in memory


def sees_padding(model: Any, tokens: Tensor, length: int, device: torch.device, as_scorable: AsScorable) -> float:
    """Return how much a row's gains change beside padding, as a multiple of TIMES_NOISE, below 1 where they do not.

    model: a transformers model; no other can be made anew from its configuration. tokens: ids that stand in the text,
    (T,), of which rows are drawn. length: of the longest row. as_scorable: makes a copy and its sites what the
    collector runs, asking nothing of its batches. Takes seconds; draws from no global random state. Raises TypeError
    for a model that is none of transformers', and whatever transformers raises where it cannot make or run the copy.
    """
    return _found_out("padding", (length, max(1, length // 2)), _padded, model, tokens, device, as_scorable)


def sees_neighbours(model: Any, tokens: Tensor, length: int, device: torch.device, as_scorable: AsScorable) -> float:
    """Return how much the gains of samples change that share a row, told apart by positions alone. See sees_padding.

    length: of the row.
    """
    second = max(1, length // 3)
    return _found_out("packing", (max(1, length - second), second), _packed, model, tokens, device, as_scorable)


def _found_out(
    what: str,
    lengths: tuple[int, int],
    arrange: Arrange,
    model: Any,
    tokens: Tensor,
    device: torch.device,
    as_scorable: AsScorable,
) -> float:
    if not hasattr(type(model), "from_pretrained"):
        raise TypeError(f"{type(model).__name__} is no model of transformers' that could be built from a configuration")
    ids = tokens[~torch.isin(tokens, torch.tensor(_special_ids(model.config)))]
    ids = ids if len(ids) else tokens

    def measure(config: Any) -> float:
        small = _build(model, config, device)
        sites = [*map(LinearSite, find_linears(small)), *find_expert_sites(small)]
        return _measure(Collector(as_scorable(small, sites)), ids, lengths, arrange)

    with _in_float32(device):
        try:
            found = measure(_cut(copy.deepcopy(model.config)))
        except Exception:  # a configuration that counts its layers in a manner of its own: then with all of them
            found = measure(copy.deepcopy(model.config))
    log.debug(
        "%s at %d tokens: %s %s (%.2g of what would count).",
        type(model).__name__, lengths[0], what, "is seen" if found > 1 else "is not seen", found,
    )  # fmt: skip
    return found


def _measure(collector: Collector, ids: Tensor, lengths: tuple[int, int], arrange: Arrange) -> float:
    with collector.attached():
        found = _compare(collector, ids, lengths, arrange, seed=0)
        # A router may waver once.
        return min(found, _compare(collector, ids, lengths, arrange, seed=1)) if found > 1 else found


def _compare(collector: Collector, ids: Tensor, lengths: tuple[int, int], arrange: Arrange, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    first, second = (ids[torch.randint(len(ids), (length,), generator=generator)] for length in lengths)
    alone = [_gains(collector, _padded([row]))[0] for row in (first, second)]
    noise = max(_LEAST, _difference(alone[1], _gains(collector, _padded([second, second.flip(0)]))[0]))
    return max(map(_difference, alone, _gains(collector, arrange([first, second])))) / (TIMES_NOISE * noise)


def _gains(collector: Collector, micro_batch: MicroBatch) -> np.ndarray:
    """Return the mean gain of every module in each sample of a batch: (samples, M), float64, 0 without a token.

    Raises ValueError where there is next to none.
    """
    totals = collector.step([micro_batch])
    is_read = ~np.isnan(totals.gain_total)  # the rest shows other activations than one per token, and has no score
    if totals.num_skipped[is_read].sum() > totals.num_tokens[is_read].sum():
        raise ValueError("most activations of the copy that was asked are zero, or no numbers")
    return (totals.gain_total / np.maximum(totals.num_tokens, 1)).T


def _padded(rows: Sequence[Tensor]) -> MicroBatch:
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    return MicroBatch(ids, mask, torch.arange(len(rows))[:, None].expand_as(ids).where(mask != 0, -1))


def _packed(rows: Sequence[Tensor]) -> MicroBatch:
    ids = torch.cat(list(rows))[None]
    samples = torch.cat([torch.full_like(row, index) for index, row in enumerate(rows)])[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    return MicroBatch(ids, torch.ones_like(ids), samples, positions)


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest relative difference of two rows' gains, (M,) each, over the modules that can be read."""
    is_read = np.isfinite(one) & np.isfinite(other)
    scale = np.maximum(np.abs(one), np.abs(other))[is_read]
    gap = np.abs(one - other)[is_read]
    return float(np.max(gap / np.maximum(scale, 1e-30), initial=0.0))


def _build(model: Any, config: Any, device: torch.device) -> nn.Module:
    model_class = _own_class(model)
    for one in _configs(config):
        vars(one).pop("quantization_config", None)
        one.dtype = torch.float32
    if config._attn_implementation not in (None, "eager", "sdpa"):
        # Flash attention computes in 16 bits alone; what keeps samples apart in torch's keeps them apart there.
        config._attn_implementation = "sdpa" if model_class._supports_sdpa else "eager"
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), unpartitioned(), unheard():
        torch.manual_seed(0)
        with torch.device("meta"):
            twin = model_class(config)
        weights = _random_weights(twin, device)
        with _marked():
            small = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
        for parameter in filter(_is_unwritten, small.parameters()):
            nn.init.normal_(parameter, std=0.1)
        made = dict(model.named_buffers())  # as its class makes them: constants of an activation (Apertus), say
        for name, buffer in small.named_buffers():
            known = name in made and made[name].shape == buffer.shape and not made[name].is_meta
            if _is_unwritten(buffer) and known:
                buffer.copy_(made[name])
    return small.to(device).eval()


def _is_unwritten(tensor: Tensor) -> bool:
    """Tell whether a tensor is as _marked leaves it."""
    first = tensor.detach()[(slice(0, 1),) * tensor.dim()]  # no reshape: rows that overlap would be copied whole
    return tensor.is_floating_point() and bool(first.isnan().any())


@contextmanager
def _marked() -> Iterator[None]:
    """Have memory that nothing is written to hold NaN within the block, as torch does beside deterministic algorithms.

    transformers 5.12 leaves biases of some families (OpenAI GPT's) in whatever memory they got.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    is_filled, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = is_filled


def _own_class(model: Any) -> Any:
    """Return transformers' class: fully_shard and the like give a model one of their own."""
    return next(cls for cls in type(model).__mro__ if not cls.__name__.startswith("FSDP"))


def _special_ids(config: Any) -> list[int]:
    """Return the ids that stand for more than text: places of images and sounds, padding."""
    names = ("_token_id", "_token_index")
    return [
        value
        for one in _configs(config)
        for name, value in vars(one).items()
        if name.endswith(names) and isinstance(value, int)
    ]


@contextmanager
def _in_float32(device: torch.device) -> Iterator[None]:
    """Compute in float32 within the block, whatever the host has set."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)


def _random_weights(twin: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Return a weight for every matrix of linears, embeddings and experts; transformers makes most others."""
    found = {}
    for path, module in named_modules(twin).items():
        is_matrix = isinstance(module, nn.Linear | Conv1D | nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False):
            shape = tuple(parameter.shape)
            if len(shape) < 2 or not (is_matrix or (len(shape) == 3 and not isinstance(module, nn.Conv1d))):
                continue
            generator = torch.Generator(device).manual_seed(len(found))
            found[f"{path}.{name}"] = _overlapping(shape, generator, device)
    return found


def _overlapping(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Return a random tensor, (..., O, I), whose rows are stretches of one line of numbers, of variance 1 / I."""
    *outer, width = shape
    num_rows = int(np.prod(outer))
    line = torch.randn(width + _ROW_STEP * (num_rows - 1), generator=generator, device=device) / width**0.5
    strides = [1]
    step = _ROW_STEP
    for size in reversed(outer):
        strides.insert(0, step)
        step *= size
    return line.as_strided(shape, strides)


def _cut(config: Any) -> Any:
    """Take all layers but one of each kind out of a configuration and those inside it; returns it."""
    for one in _configs(config):
        number = getattr(one, "num_hidden_layers", None)
        if not isinstance(number, int) or number <= 2:
            continue
        lists = {
            name: value
            for name, value in vars(one).items()
            if isinstance(value, list | tuple) and len(value) == number and not name.startswith("_")
        }
        kinds: dict[str, int] = {}
        for index in range(number):
            kinds.setdefault(str([value[index] for value in lists.values()]), index)
        chosen = sorted(kinds.values())[:_MAX_LAYERS]
        chosen += [index for index in range(number) if index not in chosen][: max(0, 2 - len(chosen))]
        for name, value in lists.items():
            setattr(one, name, type(value)(value[index] for index in chosen))
        one.num_hidden_layers = len(chosen)
    return config


def _configs(config: Any) -> Iterator[Any]:
    """Yield a configuration and those inside it."""
    from transformers import PreTrainedConfig

    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)
