"""Training rows as batches whose order depends on the seed alone, and the held-out rows."""

# b rows of a micro-batch, s tokens of its longest row

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from plop_dist import ranks
from plop_dist.backends.hf.load import load_hf_config, meta_model
from plop_dist.backends.hf.packed_training import check_packing
from plop_dist.backends.hf.positions import check_completions, check_positions
from plop_dist.config.schema import Config, DataConfig, TrainConfig
from plop_dist.data.images import refuse_images
from plop_dist.data.rows import load_rows
from plop_dist.data.texts import Row, fill, render, render_prompt, token_ids
from plop_dist.errors import DataError
from plop_dist.training.batch import IGNORED, Batch
from plop_dist.training.engine import Data

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowSet:
    """Rows to train on or to hold out: data says what of them is the text, and its path where they are from.

    first: the number of the first row there, counted from 1, for messages.
    """

    rows: Sequence[Row]
    data: DataConfig
    first: int = 1

    def numbered(self) -> Iterator[tuple[int, Row]]:
        """Return every row with its number."""
        return enumerate(self.rows, start=self.first)


@dataclass(frozen=True)
class Example:
    """Token ids of one training sequence; labels repeat them, or hold IGNORED where no loss is wanted (the prompt)."""

    input_ids: list[int]
    labels: list[int]

    @property
    def has_target(self) -> bool:
        """Whether any token is in the loss; the first one never is."""
        return any(label != IGNORED for label in self.labels[1:])


def split_rows(config: Config) -> tuple[RowSet, RowSet]:
    """Return training rows and held-out rows: the last train.eval_samples, unless train.eval_path names others.

    Raises DataError when nothing is left to train on.
    """
    train = config.train
    data = config.data.model_copy(update={"path": train.data_path or config.data.path})
    if train.method == "grpo" and train.prompt_template is not None:
        data = data.model_copy(update={"messages_field": None})  # what is asked is the template's text, and no chat
    rows = load_rows(data.path, data.split)
    if train.eval_path is not None:
        held_out = load_rows(train.eval_path, data.split)[: train.eval_samples]
        return RowSet(rows, data), RowSet(held_out, data.model_copy(update={"path": train.eval_path}))
    if len(rows) <= train.eval_samples:
        raise DataError(
            f"{data.path} has {len(rows)} rows, but train.eval_samples holds out {train.eval_samples}; lower it or "
            "pass train.eval_path."
        )
    num_rows = len(rows) - train.eval_samples
    return RowSet(rows[:num_rows], data), RowSet(rows[num_rows:], data, first=num_rows + 1)


def encode(row_set: RowSet, train: TrainConfig, tokenizer: Any) -> list[Example]:
    """Return the tokenised rows, truncated to train.max_length, with an end-of-text token where one fits.

    Raises DataError when a row's text does not begin with its prompt, when no token is left in the loss, and for rows
    with images.
    """
    data = row_set.data
    refuse_images(row_set.rows, data)
    texts = [render(row, number, data, tokenizer) for number, row in row_set.numbered()]
    num_prompts = _count_prompts(row_set, texts, train, tokenizer)
    examples = []
    for ids, num_prompt in zip(token_ids(texts, data, tokenizer, first=row_set.first), num_prompts, strict=True):
        if tokenizer.eos_token_id is not None and ids and ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        ids = ids[: train.max_length]
        examples.append(Example(ids, [IGNORED] * min(num_prompt, len(ids)) + ids[num_prompt:]))
    if not any(example.has_target for example in examples):
        raise DataError(
            f"{data.path}: no token of {len(texts)} rows is in the loss; train.max_length is {train.max_length}, which "
            "cuts everything after the prompts: raise it, or change train.prompt_template."
        )
    return examples


def check_readable(config: Config, longest: int) -> None:
    """Raise DataError where the model cannot read the rows as they are trained on. Reads no weights.

    Where the longest, in tokens, has more of them than the model has places, or train.packing puts samples into one row
    that see each other there.
    """
    hf_config = load_hf_config(config.model)
    build = lambda: meta_model(config.model, hf_config)  # noqa: E731
    check_positions(config, hf_config, longest, build, section="train")
    if config.train.packing:
        check_packing(build(), config.train.max_length)


def prompts_of(row_set: RowSet, train: TrainConfig, tokenizer: Any) -> list[str]:
    """Return each row's prompt: train.prompt_template, or what is scored of it (see render_prompt).

    Raises DataError naming the row and the column that is missing, and for rows with images.
    """
    refuse_images(row_set.rows, row_set.data)
    return [
        render_prompt(row, number, row_set.data, train.prompt_template, tokenizer) for number, row in row_set.numbered()
    ]


def ids_of_prompts(row_set: RowSet, prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the tokens of each row's prompt. Raises DataError naming the row for one without a token."""
    every = token_ids(prompts, row_set.data, tokenizer, first=row_set.first)
    empty = next((number for number, ids in enumerate(every, start=row_set.first) if not ids), None)
    if empty is not None:
        raise DataError(
            f"{row_set.data.path}: row {empty}: the prompt has no token, so that nothing predicts a completion's "
            "first; give it text (train.prompt_template), or leave the row out."
        )
    return every


def check_prompts(config: Config, row_set: RowSet, prompt_ids: Sequence[Sequence[int]]) -> None:
    """Raise DataError where the model has fewer places than the longest prompt and a completion have tokens.

    Reads no weights. prompt_ids: of each row.
    """
    hf_config = load_hf_config(config.model)
    longest, index = max((len(ids), -index) for index, ids in enumerate(prompt_ids))
    build = lambda: meta_model(config.model, hf_config)  # noqa: E731
    check_completions(config, hf_config, longest, row_set.first - index, row_set.data.path, build)


def _count_prompts(row_set: RowSet, texts: Sequence[str], train: TrainConfig, tokenizer: Any) -> list[int]:
    """Return how many tokens of each row are its prompt, 0 without train.prompt_template. Raises DataError."""
    if train.prompt_template is None:
        return [0] * len(texts)
    data, prompts = row_set.data, []
    for (number, row), text in zip(row_set.numbered(), texts, strict=True):
        prompt = fill(train.prompt_template, row, number, data.path)
        if not text.startswith(prompt):
            raise DataError(
                f"{data.path}: row {number}: the text does not begin with train.prompt_template's {prompt[:40]!r}; "
                "make data.template begin with it."
            )
        prompts.append(prompt)
    return [len(ids) for ids in token_ids(prompts, data, tokenizer, first=row_set.first)]


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


def collate(rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
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


def count_rows(data: Data, config: Config, num_steps: int) -> dict[str, float]:
    """Return on how much the losses of a training rest: held-out rows and, where the rows end, rows and epochs."""
    counts: dict[str, float] = {"num_held_out_rows": sum(len(batch["input_ids"]) for batch in data.held_out)}
    if not isinstance(data, Endless):
        return counts
    train = config.train
    per_step = train.micro_batch_size * train.gradient_accumulation_steps * config.parallel.dp
    num_rows = sum(len(sequence) if isinstance(sequence, list) else 1 for sequence in data.sequences)
    return {"num_rows": num_rows, "num_epochs": num_steps * per_step / len(data.sequences), **counts}


class Endless:
    """Sequences of rows as micro-batches: epochs without end, each in a shuffled order of its own."""

    def __init__(self, sequences: Sequence[Any], seed: int, size: int) -> None:
        self.sequences, self._seed, self._size = sequences, seed, size
        self._epoch, self._order = -1, list[int]()

    def rows_of(self, index: int) -> list[Any]:
        """Return the sequences of a micro-batch."""
        return [self._at(position) for position in range(index * self._size, (index + 1) * self._size)]

    def _at(self, position: int) -> Any:
        epoch, index = divmod(position, len(self.sequences))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self.sequences)))
            random.Random(f"{self._seed}:{epoch}").shuffle(self._order)
        return self.sequences[self._order[index]]


class TrainingData(Endless):
    """The configured rows as micro-batches (see engine.Data), one example in a sequence, or several packed.

    held_out: every held-out row once, in file order. longest: the tokens of the longest row.
    """

    def __init__(self, config: Config, tokenizer: Any) -> None:
        train_rows, held_out_rows = split_rows(config)
        train = config.train
        self._pad_id, size = tokenizer.pad_token_id, train.micro_batch_size
        every = encode(train_rows, train, tokenizer)
        examples = [example for example in every if example.has_target]
        if len(examples) < len(every) and ranks.rank() == 0:
            logger.warning(
                "%d of %d training rows are left out: none of their tokens is in the loss at train.max_length=%d.",
                len(every) - len(examples), len(every), train.max_length,
            )  # fmt: skip
        sequences = pack(examples, train.max_length) if train.packing else [[example] for example in examples]
        super().__init__(sequences, train.seed, size)
        others = encode(held_out_rows, train, tokenizer)
        self.longest = max(len(example.input_ids) for example in (*every, *others))
        held_out = [[example] for example in others if example.has_target]
        self.held_out = [
            collate(held_out[start : start + size], self._pad_id) for start in range(0, len(held_out), size)
        ]

    def micro_batch(self, index: int) -> Batch:
        """Return the index-th train.micro_batch_size rows of the endless sequence of epochs, as collate does."""
        return collate(self.rows_of(index), self._pad_id)
