"""Where the squared norms that hooks note are kept until a micro-batch is finished."""

# T tokens

from __future__ import annotations

from torch import Tensor


class NoteStorage:
    """Storage for what hooks note during a forward, reused by the next one.

    Left where they were made, these small tensors lie between the activations that come and go, and the CPU's allocator
    can neither join nor return the room around them: that costs several times their own size in memory. CUDA's keeps
    small tensors apart by itself, and a kernel that copies one costs as much there as the norm did.
    """

    _SLAB = 1 << 18  # elements

    def __init__(self) -> None:
        self._slabs: list[Tensor] = []
        self._slab, self._used = 0, 0

    def rewind(self) -> None:
        """Begin anew; what was kept may be overwritten."""
        self._slab, self._used = 0, 0

    def keep(self, row_T: Tensor) -> Tensor:
        """Return a (T,) float32 tensor that lives until rewind(): a copy, or on a GPU the tensor itself."""
        if row_T.device.type == "cuda":
            return row_T
        size = row_T.numel()
        while self._slab < len(self._slabs) and self._used + size > self._slabs[self._slab].numel():
            self._slab, self._used = self._slab + 1, 0
        if self._slab == len(self._slabs):
            self._slabs.append(row_T.new_empty(max(self._SLAB, size)))
        kept_T = self._slabs[self._slab][self._used : self._used + size]
        self._used += size
        return kept_T.copy_(row_T)
