"""How many tokens of a text a model has places for: where they stand in a table, the forward pass fails behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from plop_dist.backends.hf.parts import part_finder
from plop_dist.config.schema import Config
from plop_dist.errors import DataError

_RESERVED = 2  # rows that a table has before the first place (OPT, BART)


def check_positions(
    config: Config,
    hf_config: Any,
    longest: int,
    build: Callable[[], nn.Module],
    *,
    section: Literal["data", "train"] = "data",
) -> None:
    """Raise DataError if the longest text, in tokens, has more of them than the model has places.

    build: gives the model, of which no weight is read; asked only where the configuration's own number is near.
    section: that of the max_length by which the texts are cut.
    """
    most = _exceeded(hf_config, longest, build)
    if most is not None:
        raise DataError(
            f"{section}.max_length is {getattr(config, section).max_length} and the longest text has {longest} tokens, "
            f"but {_has_places(config, most)}; set {section}.max_length={most}, or choose a model that takes longer "
            "texts."
        )


def check_completions(
    config: Config, hf_config: Any, longest_prompt: int, number: int, source: str, build: Callable[[], nn.Module]
) -> None:
    """Raise DataError if the longest prompt and a completion of train.max_completion_length have too many tokens.

    longest_prompt: its tokens; number, source: of its row, and where the rows are from; build: as check_positions has.
    """
    longest_completion = config.train.max_completion_length
    most = _exceeded(hf_config, longest_prompt + longest_completion, build)
    if most is None:
        return
    left = most - longest_prompt
    remedy = f"set train.max_completion_length={left}" if left > 0 else "leave out rows with such prompts"
    raise DataError(
        f"{source}: row {number}: the prompt has {longest_prompt} tokens and train.max_completion_length is "
        f"{longest_completion}, together {longest_prompt + longest_completion}, but {_has_places(config, most)}; "
        f"{remedy}, or choose a model that takes longer texts."
    )


def num_positions(model: nn.Module) -> int | None:
    """Return the length of the model's table of places for tokens of text, None where it has no table.

    A table is an embedding other than that of the tokens, or a buffer (GPT-J's sines, Nomic-BERT's token types), with
    as many places as the configuration says. Rotary models have none, and take more tokens than they were trained on.
    """
    config: Any = model.config
    said = _said_positions(config)
    if said is None or said == config.get_text_config().vocab_size:
        return None
    part_of = part_finder(model)
    found = [
        num_places
        for path, module in model.named_modules()
        if (num_places := _num_places(module, said)) is not None and part_of(path) == "language"
    ]
    return min(found, default=None)


def _exceeded(hf_config: Any, longest: int, build: Callable[[], nn.Module]) -> int | None:
    """Return how many places the model has, where these are fewer than the longest text has tokens."""
    said = _said_positions(hf_config)
    if said is None or longest <= said - _RESERVED:
        return None
    most = num_positions(build())
    return most if most is not None and longest > most else None


def _has_places(config: Config, most: int) -> str:
    return f"model.name_or_path '{config.model.name_or_path}' has places for {most} alone"


def _num_places(module: nn.Module, said: int) -> int | None:
    if isinstance(module, nn.Embedding) and said <= module.num_embeddings <= said + _RESERVED:
        # RoBERTa counts from behind the padding token's id.
        before = 0 if module.padding_idx is None else module.padding_idx + 1
        return min(said, module.num_embeddings - before) if before < said else said
    tables = [table for _, table in module.named_buffers(recurse=False) if table.dim() == 2]
    return said if any(len(table) == said or table.shape == (1, said) for table in tables) else None


def _said_positions(hf_config: Any) -> int | None:
    return getattr(hf_config.get_text_config(), "max_position_embeddings", None)
