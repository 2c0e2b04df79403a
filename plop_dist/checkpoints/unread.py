"""A tensor that is read from its files when it is first computed with, and holds no memory until then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class UnreadTensor(torch.Tensor):
    """Stands for a tensor in a state dict; every operation on it reads it anew, and none keeps what was read.

    read: returns the tensor, whole, in fresh memory.
    """

    read: Callable[[], Tensor]

    # Else torch would make an UnreadTensor of every result.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType] torch's own way

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, read: Callable[[], Tensor]) -> UnreadTensor:
        """Return the stand-in for what read() will return, of this shape and dtype on the CPU."""
        unread = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=torch.device("cpu"))
        unread.read = read
        return unread

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Read every argument that has not been read, and compute."""
        args, kwargs = tree_map_only(UnreadTensor, lambda unread: unread.read(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getitem__(self, index: Any) -> Tensor:
        """Return a part in memory of its own: a view would keep the whole tensor alive."""
        whole = self.read()
        part = whole[index]
        return part if part.numel() == whole.numel() else part.clone()


def unread_pieces(shape: Sequence[int], pieces: Sequence[Tensor]) -> UnreadTensor:
    """Return the stand-in for a tensor whose elements lie in 1-D views of mapped files, one after the other.

    pieces: hold at least as many elements as `shape`; what is left over is padding.
    """
    shape = torch.Size(shape)

    def read() -> Tensor:
        flat = torch.empty(shape.numel(), dtype=pieces[0].dtype)
        start = 0
        for piece in pieces:
            length = min(piece.numel(), flat.numel() - start)
            flat[start : start + length].copy_(piece[:length])
            start += length
        assert start == flat.numel(), f"{start} elements for shape {tuple(shape)}"
        return flat.view(shape)

    return UnreadTensor(shape, pieces[0].dtype, read)


def unread_shards(shards: Sequence[UnreadTensor], dim: int) -> UnreadTensor:
    """Return the stand-in for the shards of a tensor, joined along one dimension."""
    shape = list(shards[0].shape)
    shape[dim] = sum(shard.shape[dim] for shard in shards)
    return UnreadTensor(shape, shards[0].dtype, lambda: torch.cat([shard.read() for shard in shards], dim))
