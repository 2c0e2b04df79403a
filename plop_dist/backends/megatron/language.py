"""The language model inside a vision-language one: it alone is scored, on its text."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plop_dist.backends.megatron.chunks import unwrap
from plop_dist.values.scores import Projection

logger = logging.getLogger(__name__)

NAME = "language_model"  # in Bridge's models and in transformers'


def language_model(chunk: nn.Module) -> Any:
    """Return a chunk's language model, without wrappers: the chunk itself, or what sees images beside it."""
    inner = unwrap(chunk)
    return getattr(inner, NAME, inner)


def kinds_of_text(chunk: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """Return what a chunk's forward asks besides, where it works places out by itself: that every token is text."""
    name = "mm_token_type_ids"
    takes = name in inspect.signature(unwrap(chunk).forward).parameters
    return {name: torch.zeros_like(input_ids)} if takes else {}


def language_path(whole: nn.Module) -> str:
    """Return the path of the language model inside a Hugging Face model, "" where there is nothing beside it."""
    return next((path for path, _ in whole.named_modules() if path.rpartition(".")[2] == NAME), "")


def is_of_language(name: str, whole: nn.Module) -> bool:
    """Tell whether a module or parameter of a Hugging Face model belongs to its language model or head."""
    return name.startswith((f"{language_path(whole)}.", "lm_head"))


def of_language(whole: nn.Module, known: Mapping[str, Projection]) -> dict[str, Projection]:
    """Return the projections that text goes through; the log says how many do not."""
    kept = {fqn: item for fqn, item in known.items() if is_of_language(fqn, whole)}
    logger.warning(
        "The language model alone is scored, on its text: %d projections beside it (of images) are left out.",
        len(known) - len(kept),
    )
    return kept
