"""The benchmark's structure, and what scoring communicates: one collective per micro-batch, of the predicted size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config, EstimatorConfig
from plop_dist.costs.bench import (
    HEADLESS,
    SCORING,
    VARIANTS,
    Subject,
    measure_baselines,
    measure_peak,
    measure_times,
    run_bench,
)
from plop_dist.costs.plan import build_plan
from plop_dist.costs.scaling import measure_scaling
from plop_dist.errors import LayoutError
from plop_dist.measure.note_storage import NoteStorage
from plop_dist.report.cost_tables import print_bench
from tests.models import save_tiny


def configured(directory: Path, num_layers: int = 2, **parallel: Any) -> Config:
    model = save_tiny("llama", directory / f"llama-{num_layers}", num_hidden_layers=num_layers)
    return parse_config(
        {
            "model": {"name_or_path": str(model)},
            "data": {"path": "builtin:arithmetic", "num_samples": 8, "max_length": 32, "batch_size": 4},
            "estimator": {"num_directions": 4},
            "parallel": parallel,
        }
    )


def test_times_and_structure(tmp_path: Path) -> None:
    subject = Subject(configured(tmp_path))
    assert len(subject.fqns) == 2 * 7
    assert [batch.input_ids.shape[0] for batch in subject.micro_batches] == [4, 4]
    times = measure_times(subject, repeats=2)
    assert set(times) == set(VARIANTS)
    assert all(seconds > 0 and cpu > 0 for seconds, cpu in times.values())
    assert not any(module._forward_hooks for module in subject.module.modules())


@pytest.mark.slow
def test_peak_is_that_of_the_variant_alone(tmp_path: Path) -> None:
    config = configured(tmp_path)
    assert 50e6 < measure_peak(config, SCORING) < 4e9


@pytest.mark.slow
def test_collectives_do_not_depend_on_the_number_of_modules(tmp_path: Path) -> None:
    found = {}
    for num_layers in (2, 6):
        config = configured(tmp_path, num_layers, tp=2)
        (found[num_layers],) = measure_scaling(config, 2)
        assert found[num_layers].num_modules == 7 * num_layers
        # The plan's arithmetic is what the reducer really sends.
        stage = build_plan(config).stages[0]
        assert found[num_layers].collectives_per_micro_batch == stage.scoring.num_collectives == 1
        assert found[num_layers].num_bytes == found[num_layers].num_padded_tokens * 7 * num_layers * 4
        assert stage.scoring.num_bytes == 4 * 32 * 7 * num_layers * 4
    assert found[2].num_fixed_collectives == found[6].num_fixed_collectives
    assert found[2].bytes_per_token_and_layer == found[6].bytes_per_token_and_layer


def test_fewer_ranks_than_the_layout_needs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"--ranks 2 is less than parallel\.tp \* pp \* cp \(4\); use --ranks 4"):
        measure_scaling(configured(tmp_path, backend="megatron", tp=4), 2)


@pytest.mark.slow
def test_the_whole_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = run_bench(configured(tmp_path), ranks=2, repeats=1)
    assert [entry.num_ranks for entry in bench.scaling] == [1, 2]
    # Replicas talk only at the ends.
    assert [entry.num_collectives for entry in bench.scaling] == [0, 0]
    assert bench.scaling[0].num_fixed_collectives == 0 < bench.scaling[1].num_fixed_collectives
    assert bench.ratio(HEADLESS, HEADLESS) == 1
    assert bench.product_seconds is not None
    assert 0 < bench.product_seconds < bench.baseline_seconds
    assert bench.baseline_ratio == bench.baseline_seconds / bench.product_seconds
    print_bench(bench)
    text = capsys.readouterr().out
    assert all(name in text for name in (*VARIANTS, "Weak scaling", "efficiency"))
    assert f"baselines / matmul of their directions {bench.baseline_ratio:.2f}" in text


def test_baselines_without_directions_are_compared_with_nothing(tmp_path: Path) -> None:
    subject = Subject(configured(tmp_path))
    seconds, product_seconds = measure_baselines(subject, EstimatorConfig(baseline="closed_form"), repeats=1)
    assert seconds > 0
    assert product_seconds is None


def test_notes_lie_in_storage_that_the_next_forward_reuses(tmp_path: Path) -> None:
    """Small tensors left between activations would cost a third of the peak memory (fragmentation)."""
    subject = Subject(configured(tmp_path))
    places = []
    with subject.collector.attached():
        for _ in range(2):
            subject.run(SCORING, subject.micro_batches[0])
            places.append([slab.data_ptr() for slab in subject.collector._kept._slabs])
    assert places[0] == places[1]
    assert len(places[0]) == 1


def test_note_storage_keeps_rows_apart_and_grows() -> None:
    storage = NoteStorage()
    for _ in range(2):
        rows = [torch.full((size,), float(number)) for number, size in enumerate((3, NoteStorage._SLAB, 0, 5, 300_000))]
        kept = [storage.keep(row) for row in rows]
        assert all(torch.equal(copy, row) for copy, row in zip(kept, rows, strict=True))
        storage.rewind()
