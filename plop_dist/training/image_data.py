"""Training rows with images as batches: the processor's, in the order that rows of text would have."""

# b rows of a micro-batch, s tokens of its longest row

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from plop_dist.backends.hf.dtype import weights_dtype
from plop_dist.backends.hf.load import load_hf_config, load_processor
from plop_dist.backends.hf.tokens import placeholders
from plop_dist.config.schema import Config
from plop_dist.data.images import has_images
from plop_dist.data.processed import ImageRows
from plop_dist.data.texts import fill
from plop_dist.errors import ConfigError, DataError
from plop_dist.training.batch import IGNORED, Batch
from plop_dist.training.data import Endless, RowSet, TrainingData, check_readable, split_rows


def training_data(config: Config, tokenizer: Any) -> TrainingData | ImageTrainingData:
    """Return the configured rows: as the processor reads them where any has an image. Raises DataError, ConfigError."""
    sets = split_rows(config)
    if not any(has_images(row_set.rows, row_set.data) for row_set in sets):
        data = TrainingData(config, tokenizer)
        check_readable(config, data.longest)
        return data
    check_keys(config)
    return ImageTrainingData(config, *sets, load_processor(config.model))


def check_keys(config: Config) -> None:
    """Raise ConfigError for keys that rows with images do not go with."""
    for key in ("packing", "track_nfn_every"):
        if getattr(config.train, key):
            raise ConfigError(
                f"train.{key} is {getattr(config.train, key)}, but the rows have images, which it does not read; leave "
                "it out."
            )


class ImageTrainingData(Endless):
    """The configured rows as micro-batches (see engine.Data), read by the processor when their turn comes.

    held_out: every held-out row once, in file order.
    """

    def __init__(self, config: Config, rows: RowSet, held_out: RowSet, processor: Any) -> None:
        train = config.train
        super().__init__(range(len(rows.rows)), train.seed, train.micro_batch_size)
        processor.tokenizer.padding_side = "right"
        self._template, self._processor = train.prompt_template, processor
        self._end = processor.tokenizer.eos_token or ""
        hf_config = load_hf_config(config.model)
        self._dtype, self._places = weights_dtype(config.model, hf_config), placeholders(hf_config)["image"]
        self._rows = self._read_by(rows, train.max_length)
        others = self._read_by(held_out, train.max_length)
        starts = range(0, len(others), train.micro_batch_size)
        self.held_out = [self._batch(others, range(len(others))[at : at + train.micro_batch_size]) for at in starts]
        if not any(bool((batch["labels"] != IGNORED).any()) for batch in self.held_out):
            raise DataError(
                f"{held_out.data.path}: no token of the held-out rows is in the loss; train.max_length is "
                f"{train.max_length}: raise it, or change train.prompt_template."
            )

    def micro_batch(self, index: int) -> Batch:
        """Return the index-th train.micro_batch_size rows of the endless sequence of epochs. Raises DataError."""
        return self._batch(self._rows, self.rows_of(index))

    def _read_by(self, row_set: RowSet, max_length: int) -> ImageRows:
        return ImageRows(
            row_set.rows,
            row_set.data,
            self._processor,
            max_length,
            first=row_set.first,
            dtype=self._dtype,
            places=self._places,
        )

    def _batch(self, rows: ImageRows, indices: Sequence[int]) -> Batch:
        """Return what the model reads of some rows, and labels: text behind the prompt, no image, no padding."""
        batch: Batch = rows.read(list(indices), end=self._end)
        ids = batch["input_ids"]
        mask = batch.setdefault("attention_mask", torch.ones_like(ids))
        is_left_out = (mask == 0) | rows.is_placeholder(ids)
        is_left_out[:, 0] = True
        for place, index in enumerate(indices):
            is_left_out[place, : self._count_prompt(rows, index)] = True
        places = (mask.cumsum(dim=1) - 1).clamp_min(0)
        return {**batch, "labels": ids.masked_fill(is_left_out, IGNORED), "position_ids": places}

    def _count_prompt(self, rows: ImageRows, index: int) -> int:
        if self._template is None:
            return 0
        number, row = rows.first + index, rows.rows[index]
        prompt = fill(self._template, row, number, rows.data.path)
        if not rows.text(index, 0).startswith(prompt):
            raise DataError(
                f"{rows.data.path}: row {number}: the text does not begin with train.prompt_template's "
                f"{prompt[:40]!r}; make data.template begin with it."
            )
        data = rows.data.model_copy(update={"template": self._template, "messages_field": None, "text_field": None})
        alone = self._read_by(RowSet(rows.rows, data, rows.first), rows.max_length)
        return alone.read([index])["input_ids"].shape[1]
