"""The directions of many projections, drawn ahead by several threads: torch draws random numbers with one core."""

# I in_features, K directions

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from plop_dist.config.schema import EstimatorConfig
from plop_dist.measure.norms import directions
from plop_dist.values.scores import Projection

_AHEAD_BYTES = 32 << 20  # of directions that wait for their weight; one projection's at the least
_AHEAD_PER_THREAD = 8


class Draws:
    """Gives each projection's directions, (K, I) float32 on the CPU; those that come next are drawn with them.

    Drawn in the pauses between the products, never beside them, whose threads they would hold up.
    """

    def __init__(self, estimator: EstimatorConfig, projections: Iterable[Projection] = ()) -> None:
        """projections: in the order in which they will be asked for. Others are drawn when they are asked for."""
        self._estimator = estimator
        self._coming = deque(projections)
        self._drawn: dict[str, Tensor] = {}

    def of(self, projection: Projection) -> Tensor:
        """Return norms.directions of this projection. Each is kept until it is asked for once."""
        while projection.fqn not in self._drawn and self._coming:
            self._drawn |= self._draw_next()
        drawn = self._drawn.pop(projection.fqn, None)
        return self._draw(projection) if drawn is None else drawn

    def _draw_next(self) -> dict[str, Tensor]:
        num_threads = torch.get_num_threads()
        batch = [self._coming.popleft()]
        num_bytes = self._num_bytes(batch[0])
        while self._coming and len(batch) < _AHEAD_PER_THREAD * num_threads:
            num_bytes += self._num_bytes(self._coming[0])
            if num_bytes > _AHEAD_BYTES:
                break
            batch.append(self._coming.popleft())
        if len(batch) == 1 or num_threads == 1:
            return {projection.fqn: self._draw(projection) for projection in batch}
        with ThreadPoolExecutor(max_workers=num_threads) as pool:
            return {projection.fqn: u_KI for projection, u_KI in zip(batch, pool.map(self._draw, batch), strict=True)}

    def _num_bytes(self, projection: Projection) -> int:
        return 4 * self._estimator.num_directions * projection.in_features

    def _draw(self, projection: Projection) -> Tensor:
        estimator = self._estimator
        return directions(estimator.seed, projection.fqn, estimator.num_directions, projection.in_features)
