"""Which sample each token of a call belongs to, whatever shape the module saw and whoever routed the tokens to it."""

# T tokens, S samples, E experts

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from plop_dist.measure.protocols import Routing


class TokenSamples:
    """The samples of one micro-batch's tokens, numbered 0 to S-1 in ascending order of their ids; -1 is padding.

    layout: sample ids, (b, s) or (s, b), in the order of the hidden states; (b,) where only rows are known, of which
    every position counts. routed_T: those of the tokens that experts
    are fed from, and maps: per router which of them go where, (T, E) bool; both of all source ranks, one after the
    other.
    """

    def __init__(
        self, layout: Tensor, routed_T: Tensor | None = None, maps: Mapping[str, Tensor] | None = None
    ) -> None:
        every = [layout.reshape(-1)] if routed_T is None else [layout.reshape(-1), routed_T]
        ids_S = torch.cat(every).unique()
        self.sample_ids = ids_S[ids_S >= 0]  # (S,) int64, ascending
        self._layout = self._number(layout)
        self._flat = self._layout.reshape(-1)
        self._by_shape: dict[tuple[int, ...], Tensor | None] = {}
        self._routed_T = None if routed_T is None else self._number(routed_T)
        self._maps = maps or {}

    def of_shape(self, shape: Sequence[int]) -> Tensor | None:
        """Return the sample number of each of a module's vectors, (T,), by the shape of z without its features.

        None for activations that are not the batch's tokens.
        """
        key = tuple(shape)
        if key not in self._by_shape:
            self._by_shape[key] = self._spread(key)
        return self._by_shape[key]

    def of_features(self, shape: Sequence[int]) -> Tensor:
        """Return the sample number of each vector of a tower or projector, (T,), whose tokens are not the text's.

        All of them count: the text's mask says nothing of them. Which sample they belong to is certain where the batch
        has one; of several, rows share the vectors evenly where that goes, and else the first sample has them all.
        """
        return self._spread_rows(tuple(shape), self._layout if self._layout.dim() == 1 else self._layout.amax(dim=1))

    def of_all(self) -> Tensor | None:
        """Return the sample number of every token in order, (T,), or None where only rows are known."""
        return None if self._layout.dim() == 1 else self._flat

    def of_routed(self, routing: Routing) -> Tensor:
        """Return the sample number of each token that one expert was fed, (T,), by source rank and place."""
        assert self._routed_T is not None, "no router was recorded"
        return self._routed_T[self._maps[routing.router][:, routing.expert]]

    def count(self) -> Tensor:
        """Return how many tokens of the layout each sample has: (S,) int64."""
        return torch.bincount(self._flat[self._flat >= 0], minlength=len(self.sample_ids))

    def _number(self, ids: Tensor) -> Tensor:
        return torch.searchsorted(self.sample_ids, ids.clamp_min(0)).where(ids >= 0, -1)

    def _spread(self, shape: tuple[int, ...]) -> Tensor | None:
        if self._layout.dim() == 1:
            return self._spread_rows(shape, self._flat)
        first, second = self._layout.shape
        if shape in ((first, second), (first * second,)):
            return self._flat
        if len(shape) == 3 and shape[:2] == (first, second):  # one vector per head: (b, s, heads)
            return self._layout[:, :, None].expand(shape).reshape(-1)
        if len(shape) == 3 and (shape[0], shape[2]) == (first, second):  # (b, heads, s)
            return self._layout[:, None, :].expand(shape).reshape(-1)
        if len(shape) == 2 and shape[0] == first * second:  # (b * s, heads)
            return self._flat[:, None].expand(shape).reshape(-1)
        return None  # it pools, cuts or lengthens the sequence

    def _spread_rows(self, shape: tuple[int, ...], row_R: Tensor) -> Tensor:
        # What has been reshaped beyond recognition, (s, b) or pooled, still counts, under the first row's sample.
        num_positions, num_rows = math.prod(shape), len(row_R)
        if shape and shape[0] % num_rows == 0:
            return row_R.repeat_interleave(num_positions // num_rows)
        counted_R = row_R[row_R >= 0]
        return (counted_R if len(counted_R) else row_R)[:1].expand(num_positions)
