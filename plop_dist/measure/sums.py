"""Sums of gains per (module, sample): how those of several batches or ranks become one table."""

# M modules, S samples

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from plop_dist.values.sample_totals import SampleTotals


def add_totals(parts: Sequence[SampleTotals], fqns: Sequence[str]) -> SampleTotals:
    """Return the sum of totals over these modules, of which a part may lack some; samples are united, in order."""
    ids = [part.sample_ids for part in parts]
    sample_ids = np.unique(np.concatenate(ids)) if ids else np.zeros(0, np.int64)
    if len(parts) == 1 and parts[0].fqns == tuple(fqns) and np.array_equal(parts[0].sample_ids, sample_ids):
        return parts[0]
    return to_totals(spread(parts, fqns, sample_ids), fqns, sample_ids)


def spread(parts: Sequence[SampleTotals], fqns: Sequence[str], sample_ids: np.ndarray) -> Tensor:
    """Return gains, tokens and skipped tokens added up in a table of these modules and samples: (3, M, S), float64.

    sample_ids: ascending, with those of all parts among them.
    """
    planes = torch.zeros(3, len(fqns), len(sample_ids), dtype=torch.float64)
    row = {fqn: index for index, fqn in enumerate(fqns)}
    known, rows = None, torch.zeros(0, dtype=torch.int64)
    for part in parts:
        if part.fqns is not known:  # the steps of one rank are all of the same modules
            known, rows = part.fqns, torch.tensor([row[fqn] for fqn in part.fqns], dtype=torch.int64)
        columns = torch.from_numpy(np.searchsorted(sample_ids, part.sample_ids))
        for plane, array in zip(planes, (part.gain_total, part.num_tokens, part.num_skipped), strict=True):
            plane[rows[:, None], columns] += torch.from_numpy(array)
    return planes


def to_totals(planes: Tensor, fqns: Sequence[str], sample_ids: np.ndarray) -> SampleTotals:
    """Return a table of sums, (3, M, S) float64, as totals."""
    gain_total, num_tokens, num_skipped = planes.numpy()
    return SampleTotals(
        tuple(fqns), sample_ids, gain_total, num_tokens.round().astype(np.int64), num_skipped.round().astype(np.int64)
    )
