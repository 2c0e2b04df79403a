"""A tensor that is read from its files when it is first computed with, and holds no memory until then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class UnreadTensor(torch.Tensor):
    """Stands for a tensor in a state dict; every operation on it reads it anew, and none keeps what was read.

    pieces: 1-D views of mapped files which, one after the other, hold the elements; what is left over is padding.
    """

    # Else torch would make an UnreadTensor of every result.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, shape: Sequence[int], pieces: Sequence[Tensor]) -> UnreadTensor:
        """Return the stand-in; `pieces` hold at least as many elements as `shape`."""
        unread = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=pieces[0].dtype, device="cpu")
        unread._pieces = list(pieces)
        return unread

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Read every argument that has not been read, and compute."""
        args, kwargs = tree_map_only(UnreadTensor, UnreadTensor.read, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getitem__(self, index: Any) -> Tensor:
        """Return a part in memory of its own: a view would keep the whole tensor alive."""
        whole = self.read()
        part = whole[index]
        return part if part.numel() == whole.numel() else part.clone()

    def read(self) -> Tensor:
        """Return the tensor in fresh memory, whole and contiguous. Reads from the files."""
        flat = torch.empty(self.numel(), dtype=self.dtype)
        start = 0
        for piece in self._pieces:
            length = min(piece.numel(), flat.numel() - start)
            flat[start : start + length].copy_(piece[:length])
            start += length
        assert start == flat.numel(), f"{start} elements for shape {tuple(self.shape)}"
        return flat.view(self.shape)
