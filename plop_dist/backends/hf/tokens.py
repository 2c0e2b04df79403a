"""Whether a model can read the tokens of the samples, found out before its weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn

from plop_dist.backends.hf.positions import check_positions
from plop_dist.config.schema import Config
from plop_dist.errors import DataError, ModelError

_IN_OWN_JOB = "score in your own job, by plop_dist.score(model, batches)"
_SENSES = {
    "image": "give it by data.images_field, or as a content part of data.messages_field",
    "video": _IN_OWN_JOB,
    "audio": _IN_OWN_JOB,
}


def check_tokens(
    config: Config,
    hf_config: Any,
    samples: Sequence[Sequence[int]],
    longest: int,
    build: Callable[[], nn.Module],
    *,
    has_images: bool = False,
) -> None:
    """Raise ModelError for tokens that the model has no embedding for, DataError for what else it does not read.

    Texts longer than its table of places, and places for images in samples that are text alone. longest: tokens that
    it reads in one piece, at most; build: gives the model, of which no weight is read.
    """
    ids = {token for sample in samples for token in sample}
    _check_vocabulary(config, hf_config, max(ids, default=0))
    if not has_images:
        _check_placeholders(config, hf_config, ids)
    check_positions(config, hf_config, longest, build)


def _check_vocabulary(config: Config, hf_config: Any, largest_id: int) -> None:
    size = getattr(hf_config.get_text_config(), "vocab_size", None)
    if size is not None and largest_id >= size:
        raise ModelError(
            f"model.name_or_path '{config.model.name_or_path}': its tokenizer gives the token id {largest_id}, but the "
            f"model has embeddings for {size} tokens only; put the tokenizer there that the model was trained with."
        )


def _check_placeholders(config: Config, hf_config: Any, ids: Collection[int]) -> None:
    """Raise DataError where a text has the token that stands for a part of an image: it would be read as a word."""
    text = hf_config.get_text_config()
    named = {getattr(text, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    for sense, remedy in _SENSES.items():
        tokens = {getattr(hf_config, f"{sense}_token_{word}", None) for word in ("id", "index")} - named
        for token in tokens.intersection(ids):
            raise DataError(
                f"{config.data.path}: texts hold the token {token}, which is a place for {sense} input in "
                f"model.name_or_path '{config.model.name_or_path}', but no {sense} is given; {remedy}, or take its "
                "place out of the texts."
            )
