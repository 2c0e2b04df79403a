"""Directions drawn ahead by threads are those drawn one by one, whatever is asked for, in whatever order."""

from __future__ import annotations

import pytest
import torch

from plop_dist.config.schema import EstimatorConfig
from plop_dist.measure import draws, norms
from plop_dist.measure.draws import Draws
from plop_dist.values.scores import Projection


@pytest.mark.parametrize("ahead_bytes", [1, 3000, 32 << 20])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_directions_depend_on_the_path_alone(ahead_bytes: int, num_threads: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(draws, "_AHEAD_BYTES", ahead_bytes)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    coming = [Projection(fqn=f"layers.{i}.up", type="up", in_features=16 + i % 3, out_features=8) for i in range(60)]
    config = EstimatorConfig(seed=3, num_directions=5)
    drawn = Draws(config, coming)
    unforeseen = Projection(fqn="layers.77.up", type="up", in_features=16, out_features=8)
    for projection in [*coming[10:], unforeseen, *coming[:10], coming[4]]:
        expected = norms.directions(3, projection.fqn, 5, projection.in_features)
        assert torch.equal(drawn.of(projection), expected)
