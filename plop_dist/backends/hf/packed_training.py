"""Whether samples that train.packing puts into one row are trained on as they would be alone."""

from __future__ import annotations

from typing import Any

import torch

from plop_dist.backends.hf.model import HFModel
from plop_dist.backends.hf.padding import TIMES_NOISE, sees_neighbours
from plop_dist.errors import ConfigError, first_line


def check_packing(model: Any, length: int) -> None:
    """Raise ConfigError for a model whose tokens see another sample in their row, or of which that cannot be told.

    transformers tells samples in a row apart by position_ids alone, which recurrent layers, for one, do not read.
    model: one of transformers', of which no weight is read (meta device). length: of the row, in tokens.
    Computes for seconds, on few layers of random weights (see padding.py), where a process has its first GPU, if any.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = model.config.model_type
    try:
        tokens = torch.arange(model.get_input_embeddings().num_embeddings)
        found = sees_neighbours(model, tokens, length, device, HFModel(model, []).alike)
    except Exception as error:  # transformers, and whatever code comes with a model
        raise ConfigError(
            f"train.packing is true, and whether samples in one row change {kind}'s activations cannot be found out "
            f"({type(error).__name__}: {first_line(error)}); set train.packing=false."
        ) from error
    if found > 1:
        raise ConfigError(
            f"train.packing is true, but for {kind} transformers computes other activations where another sample is in "
            f"the row (their gains differ by {found * TIMES_NOISE:.0f} times what rounding does); set "
            "train.packing=false."
        )
