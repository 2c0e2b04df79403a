"""Training rows as batches whose order depends on (seed, step) alone, and the held-out rows."""

# b rows of a micro-batch, s tokens of its longest row

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plop_dist import ranks
from plop_dist.config.schema import Config
from plop_dist.data.rows import load_rows
from plop_dist.data.samples import Row, fill, render
from plop_dist.errors import DataError

logger = logging.getLogger(__name__)

IGNORED = -100  # the label that the loss skips


@dataclass(frozen=True)
class Example:
    """Token ids of one training sequence; labels repeat them, or hold IGNORED where no loss is wanted (the prompt)."""

    input_ids: list[int]
    labels: list[int]

    @property
    def has_target(self) -> bool:
        """Whether any token is in the loss; the first one never is."""
        return any(label != IGNORED for label in self.labels[1:])


def split_rows(config: Config) -> tuple[list[Row], list[Row]]:
    """Return training rows and held-out rows: the last train.eval_samples, unless train.eval_path names others.

    Raises DataError when nothing is left to train on.
    """
    train = config.train
    rows: list[Row] = list(load_rows(train.data_path or config.data.path, config.data.split))
    if train.eval_path is not None:
        return rows, list(load_rows(train.eval_path, config.data.split))[: train.eval_samples]
    if len(rows) <= train.eval_samples:
        raise DataError(
            f"{train.data_path or config.data.path} has {len(rows)} rows, but train.eval_samples holds out "
            f"{train.eval_samples}; lower it or pass train.eval_path."
        )
    return rows[: -train.eval_samples], rows[-train.eval_samples :]


def encode(rows: Sequence[Row], config: Config, tokenizer: Any) -> list[Example]:
    """Return the tokenised rows, truncated to train.max_length, with an end-of-text token where one fits.

    Raises DataError when a row's text does not begin with its prompt, and when no token is left in the loss.
    """
    data, train = config.data, config.train
    if train.data_path is not None:
        data = data.model_copy(update={"path": train.data_path})
    examples = []
    for number, row in enumerate(rows, start=1):
        text = render(row, number, data, tokenizer)
        special = {"add_special_tokens": False} if data.messages_field is not None else {}
        ids = list(tokenizer(text, **special)["input_ids"])
        if tokenizer.eos_token_id is not None and ids and ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        num_prompt = 0
        if train.prompt_template is not None:
            prompt = fill(train.prompt_template, row, number, data.path)
            if not text.startswith(prompt):
                raise DataError(
                    f"{data.path}: row {number}: the text does not begin with train.prompt_template's {prompt[:40]!r}; "
                    "make data.template begin with it."
                )
            num_prompt = len(tokenizer(prompt, **special)["input_ids"])
        ids = ids[: train.max_length]
        examples.append(Example(ids, [IGNORED] * min(num_prompt, len(ids)) + ids[num_prompt:]))
    if not any(example.has_target for example in examples):
        raise DataError(
            f"{data.path}: no token of {len(rows)} rows is in the loss; train.max_length is {train.max_length}, which "
            "cuts everything after the prompts: raise it, or change train.prompt_template."
        )
    return examples


def pack(examples: Sequence[Example], max_length: int) -> list[list[Example]]:
    """Return the examples grouped in order so that each group's tokens fit into one sequence."""
    groups: list[list[Example]] = []
    room = 0
    for example in examples:
        if not groups or len(example.input_ids) > room:
            groups.append([])
            room = max_length
        groups[-1].append(example)
        room -= len(example.input_ids)
    return groups


def collate(rows: Sequence[Sequence[Example]], pad_id: int) -> dict[str, Tensor]:
    """Return padded input_ids, attention_mask, labels and position_ids: (b, s) int64, padding on the right.

    A row of several examples is packed: positions start again at each, by which transformers keeps them apart.
    """
    length = max(sum(len(example.input_ids) for example in row) for row in rows)
    batch = {
        "input_ids": torch.full((len(rows), length), pad_id),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.int64),
        "labels": torch.full((len(rows), length), IGNORED),
        "position_ids": torch.zeros(len(rows), length, dtype=torch.int64),
    }
    for index, row in enumerate(rows):
        at = 0
        for example in row:
            part = slice(at, at + len(example.input_ids))
            batch["input_ids"][index, part] = torch.tensor(example.input_ids)
            batch["attention_mask"][index, part] = 1
            labels = torch.tensor(example.labels)
            labels[0] = IGNORED  # predicted from the example before it, if from anything
            batch["labels"][index, part] = labels
            batch["position_ids"][index, part] = torch.arange(len(example.input_ids))
            at = part.stop
    return batch


class TrainingData:
    """What the shared step loop reads (loop.Data)."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        train_rows, held_out_rows = split_rows(config)
        train = config.train
        self._train = train
        self._pad_id = tokenizer.pad_token_id
        every = encode(train_rows, config, tokenizer)
        examples = [example for example in every if example.has_target]
        if len(examples) < len(every) and ranks.rank() == 0:
            logger.warning(
                "%d of %d training rows are left out: none of their tokens is in the loss at train.max_length=%d.",
                len(every) - len(examples), len(every), train.max_length,
            )  # fmt: skip
        self.sequences = pack(examples, train.max_length) if train.packing else [[example] for example in examples]
        self._epoch, self._order = -1, list[int]()
        held_out = [[example] for example in encode(held_out_rows, config, tokenizer) if example.has_target]
        size = train.micro_batch_size
        self.held_out = [
            collate(held_out[start : start + size], self._pad_id) for start in range(0, len(held_out), size)
        ]

    def batch(self, step: int, dp_rank: int, dp_size: int) -> list[dict[str, Tensor]]:
        """Return this replica's gradient_accumulation_steps micro-batches of one optimizer step."""
        size, accumulation = self._train.micro_batch_size, self._train.gradient_accumulation_steps
        per_step = size * accumulation * dp_size
        first = step * per_step
        micro = [range(start, start + size) for start in range(first, first + per_step, size)]
        return [self.micro_batch(positions) for positions in micro[dp_rank::dp_size]]

    def micro_batch(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """Return the rows at these places of the endless sequence of shuffled epochs, as collate does."""
        return collate([self._at(position) for position in positions], self._pad_id)

    def _at(self, position: int) -> list[Example]:
        epoch, index = divmod(position, len(self.sequences))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self.sequences)))
            random.Random(f"{self._train.seed}:{epoch}").shuffle(self._order)
        return self.sequences[self._order[index]]
