"""Rows with images as the checkpoint's processor reads them: token ids with a place for each image, and features."""

# b rows of a micro-batch, s tokens of its longest row

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from plop_dist.config.schema import DataConfig
from plop_dist.data.images import images_of, with_placeholders
from plop_dist.data.singly import ReadSingly
from plop_dist.data.texts import Row, messages_of, render
from plop_dist.errors import DataError, MissingExtraError, first_line
from plop_dist.measure.protocols import MicroBatch


class ImageRows:
    """Rows with images, read one by one: how many there are at once says memory, not the number of rows.

    processor: the checkpoint's; max_length: what a row is cut to. first: the number of the first row, for messages.
    dtype: the model's, which features of 16 bits are given in: models convert those of 32 alone. places: the tokens
    that stand for parts of images by the model's word, where the processor has none (Ovis2, DeepSeek-VL).
    """

    def __init__(
        self,
        rows: Sequence[Row],
        data: DataConfig,
        processor: Any,
        max_length: int,
        *,
        first: int = 1,
        dtype: torch.dtype | None = None,
        places: Iterable[int] = (),
    ) -> None:
        self.rows, self.data, self.processor, self.max_length, self.first = rows, data, processor, max_length, first
        self._dtype, self._places = dtype, [*places, *_placeholder_ids(processor)]

    def __len__(self) -> int:
        return len(self.rows)

    def text(self, index: int, num_images: int) -> str:
        """Return the row's text, with the processor's own placeholder for each image. Raises DataError."""
        number, data = self.first + index, self.data
        if data.messages_field is None:
            return render(self.rows[index], number, data)
        messages = with_placeholders(messages_of(self.rows[index], number, data), num_images)
        try:
            return self.processor.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # chat templates raise whatever their authors chose
            raise DataError(
                f"{data.path}: row {number}: the processor's chat template cannot render column "
                f"'{data.messages_field}' ({str(error) or type(error).__name__}); it must take content parts."
            ) from error

    def read(self, indices: Sequence[int], *, end: str = "") -> dict[str, Tensor]:
        """Return what the model reads of some rows: input_ids and attention_mask, (b, s), and the processor's rest.

        end: what is appended to the texts. Keys with one entry per token are cut to max_length; padding is on the
        tokenizer's side. Raises DataError where a text has no place for its images, an image lies beyond max_length, or
        only some of the rows have images.
        """
        where = f"{self.data.path}: row {', '.join(str(self.first + index) for index in indices)}"
        images = [images_of(self.rows[index], self.first + index, self.data) for index in indices]
        counts = [len(one) for one in images]
        if any(counts) and not all(counts):
            raise DataError(f"{where}: only some of these rows have images; set train.micro_batch_size=1.")
        texts = [self.text(index, count) for index, count in zip(indices, counts, strict=True)]
        texts = [text if text.endswith(end) else text + end for text in texts]
        options: dict[str, Any] = {"return_tensors": "pt", "padding": len(texts) > 1}
        bos = getattr(self.processor.tokenizer, "bos_token", None)
        if self.data.messages_field is not None and bos and texts[0].startswith(bos):
            options["add_special_tokens"] = False  # as the processor's own apply_chat_template does
        try:
            found = dict(self.processor(text=texts, images=images if any(counts) else None, **options))
        except torch.OutOfMemoryError:
            raise
        except ImportError as error:
            raise MissingExtraError(
                f"the processor needs another package ({first_line(error)}); install what it names (most need no "
                "more than pip install 'plop-dist[vision]')."
            ) from error
        except Exception as error:  # processors raise whatever their authors chose
            names = _placeholders(self.processor)
            if any(counts) and names and not all(any(name in text for name in names) for text in texts):
                raise self._no_place(where) from error
            raise DataError(
                f"{where}: the processor cannot read text and {sum(counts)} images ({first_line(error)})."
            ) from error
        return self._cut(found, counts, where)

    def is_placeholder(self, input_ids: Tensor) -> Tensor:
        """Return which tokens, (..., s) bool, stand for a part of an image. Raises DataError where nothing says it."""
        if not self._places:
            raise DataError(
                f"{self.data.path}: the rows have images, but the processor ({type(self.processor).__name__}) does not "
                "say which tokens stand for them (image_token_id); leave data.images_field out, or score in your own "
                "job, by plop_dist.score(model, batches)."
            )
        return torch.isin(input_ids, torch.tensor(self._places, device=input_ids.device))

    def _no_place(self, where: str) -> DataError:
        names = " or ".join(map(repr, _placeholders(self.processor))) or "its image token"
        return DataError(
            f"{where} has images, but the text has no place for them; put the processor's placeholder ({names}) where "
            "each belongs, or use data.messages_field."
        )

    def _cut(self, found: dict[str, Any], counts: Sequence[int], where: str) -> dict[str, Tensor]:
        ids = found["input_ids"]
        places = self.is_placeholder(ids)
        if any(counts) and not bool(places.any(dim=1).all()):
            raise self._no_place(where)
        if bool(places[:, self.max_length :].any()):
            last = int(places.any(dim=0).nonzero().max()) + 1
            raise DataError(
                f"{where}: images reach to token {last}, beyond the {self.max_length} of max_length, and no image is "
                "cut; raise data.max_length (train.max_length in training), or make the images smaller."
            )
        length = ids.shape[1]
        return {
            name: value[:, : self.max_length] if name in _PER_TOKEN and value.shape[1] == length else self._given(value)
            for name, value in found.items()
            if isinstance(value, Tensor)
        }

    def _given(self, value: Tensor) -> Tensor:
        is_short = value.is_floating_point() and value.element_size() < 4
        return value.to(self._dtype) if is_short and self._dtype is not None else value


class ImageSamples(ReadSingly):
    """The token ids of rows with images; micro_batch() reads the images of one again."""

    def __init__(self, rows: ImageRows) -> None:
        self._rows = rows
        self._num_with_images = 0
        ids, digest = list[list[int]](), hashlib.sha256()
        for index in range(len(rows)):
            found = rows.read([index])
            ids.append(found["input_ids"][0].tolist())
            features = [value for _, value in sorted(found.items()) if value.is_floating_point()]
            self._num_with_images += bool(features)
            for value in features:
                digest.update(value.float().contiguous().numpy().tobytes())
        super().__init__(ids)
        self.digest = digest.hexdigest()[:16]

    def check_uniform(self) -> None:
        """Raise DataError where some rows have no image, so that towers would not run for every replica."""
        if self._num_with_images < len(self):
            raise DataError(
                f"{self._rows.data.path}: {len(self) - self._num_with_images} of {len(self)} rows have no image, but "
                "in this layout a forward pass is collective over the ranks, towers included; score rows with images "
                "and rows without apart, or use parallel.zero_stage=2 or less."
            )

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """Return one row as the processor reads it, or as a filler the first one."""
        found = self._rows.read(list(indices) or [0])
        ids = found.pop("input_ids")
        mask = found.pop("attention_mask", torch.ones_like(ids))
        sample_ids = torch.full_like(ids, indices[0] if indices else -1)
        return MicroBatch(ids, mask, sample_ids, None, found)


_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def _placeholder_ids(processor: Any) -> list[int]:
    # Not by create_mm_token_type_ids, which asks for lengths of images in some (SmolVLM, Idefics3).
    kinds = (getattr(processor, f"{kind}_token_ids", None) or () for kind in ("image", "video", "audio"))
    return [token for ids in kinds for token in ids if isinstance(token, int)]


def _placeholders(processor: Any) -> list[str]:
    # Gemma 3 writes a whole image where the token stands that begins one.
    names = (getattr(processor, name, None) for name in ("boi_token", "image_token"))
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))
