"""Supervised fine-tuning as it is compared: the loss of the held-out rows, each summed over its target tokens."""

# R held-out rows

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from plop_dist.backends.hf.load import load_tokenizer
from plop_dist.config.schema import Config
from plop_dist.training.batch import IGNORED, Batch
from plop_dist.training.data import Example, TrainingData, check_readable, collate
from plop_dist.training.engine import Engine
from plop_dist.training.loop import losses_of_rows, train_step

_LEAST_MARGIN = 0.001
_FORWARD_PASSES = 3.0  # what a training step costs: forward, and back through a frozen model with adapters


class HeldOutLoss:
    """See method.Method."""

    measure, sign = "held-out loss", 1

    def __init__(self, config: Config) -> None:
        self._data: dict[int, TrainingData] = {}
        self._tokenizer = load_tokenizer(config.model)
        data = self._of(config)
        check_readable(config, data.longest)
        rows = _examples(data.held_out)
        targets = [sum(label != IGNORED for label in row.labels[1:]) for row in rows]
        self.targets_R = np.array(targets, dtype=np.float64)
        size, pad_id = config.train.micro_batch_size, self._tokenizer.pad_token_id
        self._halves = [_Half(rows[half::2], size, pad_id) for half in (0, 1)]

    def stepper(self, engine: Engine, config: Config) -> Callable[[int], dict[str, Any]]:
        """Return what takes a step. See Method."""
        return partial(train_step, engine, self._of(config), config.train)

    def values(self, engine: Engine, half: int) -> list[float]:
        """Return each row's loss. See Method."""
        return self._halves[half].in_order(losses_of_rows(engine, self._halves[half].batches))

    def least_margin(self, values: Sequence[Sequence[float]]) -> float:
        """Return a thousandth of the loss without adapters. See Method."""
        return _LEAST_MARGIN * abs(sum(values[0]) / float(self.targets_R[1::2].sum()))

    def measurements_in(self, config: Config, dp_size: int) -> float:
        """Return what the steps take beside one measurement. See Method."""
        data, per_step = self._of(config), config.train.gradient_accumulation_steps * dp_size
        num_tokens = sum(_num_tokens(data.micro_batch(index)) for index in range(per_step))
        num_held_out = sum(_num_tokens(batch) for half in self._halves for batch in half.batches)
        return config.train.max_steps * _FORWARD_PASSES * num_tokens / max(num_held_out, 1)

    def _of(self, config: Config) -> TrainingData:
        """Return the rows of a training; their order depends on its seed."""
        seed = config.train.seed
        if seed not in self._data:
            self._data[seed] = TrainingData(config, self._tokenizer)
        return self._data[seed]


class _Half:
    """Rows in batches of about one length, in which little is padding: a comparison reads them many times."""

    def __init__(self, rows: Sequence[Example], size: int, pad_id: int) -> None:
        self._order = sorted(range(len(rows)), key=lambda row: -len(rows[row].input_ids))
        self.batches = [
            collate([[rows[row]] for row in self._order[start : start + size]], pad_id)
            for start in range(0, len(self._order), size)
        ]

    def in_order(self, values: Sequence[float]) -> list[float]:
        """Return the values of the batches' rows in the order that the rows had."""
        return [value for _, value in sorted(zip(self._order, values, strict=True), key=lambda pair: pair[0])]


def _examples(batches: Sequence[Batch]) -> list[Example]:
    """Return the rows of batches one by one, without their padding."""
    return [
        Example(ids[:length].tolist(), labels[:length].tolist())
        for batch in batches
        for ids, labels, length in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"].sum(dim=1).tolist(), strict=True
        )
    ]


def _num_tokens(batch: Batch) -> int:
    return int(batch["attention_mask"].sum())
