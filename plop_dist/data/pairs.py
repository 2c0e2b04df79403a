"""Rows as an encoder-decoder model reads them: the encoder gets the prompt, the decoder the rest of the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from plop_dist.config.schema import DataConfig
from plop_dist.data.images import refuse_images
from plop_dist.data.singly import ReadSingly
from plop_dist.data.texts import Row, fill, render, token_ids
from plop_dist.errors import DataError
from plop_dist.measure.protocols import MicroBatch


class PairSamples(ReadSingly):
    """Two texts of each row; the ids of a sample are those of both, and each is cut to data.max_length.

    template: train.prompt_template. Raises DataError without one, for a text that does not begin with it, and for one
    that ends there.
    """

    def __init__(self, rows: Sequence[Row], data: DataConfig, template: str | None, tokenizer: Any) -> None:
        if template is None:
            raise DataError(
                f"{data.path}: the model is an encoder-decoder one, and nothing says which part of a row its encoder "
                "reads; set train.prompt_template to what the text begins with, e.g. '{question}\\n': the decoder gets "
                "the rest."
            )
        refuse_images(rows, data)
        prompts, rests = [], []
        for number, row in enumerate(rows, start=1):
            prompt, text = fill(template, row, number, data.path), render(row, number, data, tokenizer)
            if not text.startswith(prompt) or text == prompt:
                raise DataError(
                    f"{data.path}: row {number}: the text must begin with train.prompt_template's {prompt[:40]!r}, and "
                    "go on behind it, for encoder and decoder; make data.template begin with it."
                )
            prompts.append(prompt)
            rests.append(text[len(prompt) :])
        self._read = token_ids(prompts, data, tokenizer, max_length=data.max_length)
        self._written = token_ids(rests, data, tokenizer, max_length=data.max_length, is_target=True)
        super().__init__([read + written for read, written in zip(self._read, self._written, strict=True)])

    @property
    def longest(self) -> int:
        """The tokens of the longest text, an encoder's or a decoder's."""
        return max(map(len, (*self._read, *self._written)))

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """Return one sample: the encoder's tokens, and as labels what the decoder is to write."""
        index = indices[0] if indices else 0
        ids = torch.tensor([self._read[index]])
        sample_ids = torch.full_like(ids, index if indices else -1)
        return MicroBatch(ids, torch.ones_like(ids), sample_ids, None, {"labels": torch.tensor([self._written[index]])})
