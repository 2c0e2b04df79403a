"""How weights that change their dtype are converted once AutoTP has cut them: whole, they are tp times a rank's share.

transformers maps weights whose file has the wanted dtype, which takes no memory of the process's own, but converts any
other as it reads it. Here those of linears stay mapped, as the file has them, until their shard is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plop_dist.backends.hf.load import load_model
from plop_dist.backends.hf.memory import freed_at_once
from plop_dist.config.schema import ModelConfig

_WANTED = "plop_dist_dtype"  # on a parameter that is still as stored: the dtype that it is to have


@contextmanager
def loaded_to_be_cut(model: ModelConfig) -> Iterator[Any]:
    """Give the model that AutoTP is to cut within the block; afterwards all weights have their dtype.

    Raises ModelError as load_model does.
    """
    from deepspeed.module_inject.layers import TensorParallel_Layer

    module, plain = _load(model), TensorParallel_Layer.move

    def move(self: Any, tensor: Tensor) -> Tensor:
        wanted = getattr(self.weight, _WANTED, tensor.dtype)
        return plain(self, tensor.to(wanted) if tensor.dim() == 2 else tensor)

    TensorParallel_Layer.move = move
    try:
        with freed_at_once():
            yield module
    finally:
        TensorParallel_Layer.move = plain
    for parameter in module.parameters():  # of linears that were not cut
        parameter.data = parameter.data.to(getattr(parameter, _WANTED, parameter.dtype))


def _load(model: ModelConfig) -> nn.Module:
    """Return the model, whose linears' weights may have another dtype yet, noted on them."""
    with _as_stored() as stored:
        module = load_model(model)
    if not stored:
        return module
    dtypes = {tensor.dtype for tensor, _ in stored.values()}
    matrices = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    if any(matrix.dtype in dtypes and matrix.data_ptr() not in stored for matrix in matrices):
        return load_model(model)  # some were put together of several, and what dtype they are to have is not known
    others = {id(one) for part in module.modules() if type(part) is not nn.Linear for one in part.parameters(False)}
    for matrix in matrices:
        _, wanted = stored.get(matrix.data_ptr(), (matrix, matrix.dtype))
        if id(matrix) in others:
            matrix.data = matrix.data.to(wanted)
        elif wanted != matrix.dtype:
            setattr(matrix, _WANTED, wanted)
    return module


@contextmanager
def _as_stored() -> Iterator[dict[int, tuple[Tensor, torch.dtype]]]:
    """Have transformers leave matrices in the dtype of their file; gives them, and the wanted dtype, by address."""
    from transformers import core_model_loading

    plain = core_model_loading._materialize_copy
    stored: dict[int, tuple[Tensor, torch.dtype]] = {}

    def materialize(tensor: Any, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        found = tensor[...]
        if found.dim() != 2 or not found.is_floating_point() or dtype in (None, found.dtype):
            return plain(found, device, dtype)
        stored[found.data_ptr()] = (found, dtype)  # kept, so that no other comes to have its address
        return found

    core_model_loading._materialize_copy = materialize
    try:
        yield stored
    finally:
        core_model_loading._materialize_copy = plain
