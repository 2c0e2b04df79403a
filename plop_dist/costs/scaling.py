"""What scoring communicates, and how its speed grows, on real groups of 1, 2, 4, ... ranks of this machine."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from plop_dist.config.schema import Config
from plop_dist.data.rows import load_rows
from plop_dist.data.samples import plan_steps, select_rows, step_micro_batches, tokenize
from plop_dist.errors import LayoutError, WorkerError
from plop_dist.measure.baseline import compute_baselines
from plop_dist.measure.collectives import Reducer, Traffic
from plop_dist.measure.collector import Collector
from plop_dist.measure.protocols import ScorableModel
from plop_dist.measure.sums import add_totals
from plop_dist.ranks import joined
from plop_dist.registry import BACKENDS, load
from plop_dist.values.sample_totals import SampleTotals

_GROUPS = (1, 2, 4, 8)
_MOST_STEPS = 2


@dataclass(frozen=True)
class Scaling:
    """One group of ranks. num_tokens: real tokens of one replica's num_micro_batches; seconds: of the slowest rank.

    num_collectives and num_bytes: of those micro-batches, on rank 0; num_fixed_collectives and num_fixed_bytes: those
    of a whole scoring that do not grow with the data (module names, baselines, the merge at the end).
    """

    num_ranks: int
    layout: str
    num_replicas: int
    num_layers: int
    num_modules: int
    num_micro_batches: int
    num_tokens: int
    num_padded_tokens: int
    seconds: float
    num_collectives: int
    num_bytes: int
    num_fixed_collectives: int
    num_fixed_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all replicas per second."""
        return self.num_replicas * self.num_tokens / self.seconds

    @property
    def collectives_per_micro_batch(self) -> float:
        """Collectives of one micro-batch; the same for any number of modules."""
        return self.num_collectives / self.num_micro_batches

    @property
    def collectives_per_token_and_layer(self) -> float:
        """Collectives per real token and layer."""
        return self.num_collectives / (self.num_tokens * self.num_layers)

    @property
    def bytes_per_token_and_layer(self) -> float:
        """Payload per real token and layer, in bytes."""
        return self.num_bytes / (self.num_tokens * self.num_layers)

    def efficiency_against(self, first: Scaling) -> float:
        """Return the speed per rank as a share of the speed per rank of the smallest group."""
        return (self.tokens_per_second / self.num_ranks) / (first.tokens_per_second / first.num_ranks)


def measure_scaling(config: Config, most_ranks: int) -> list[Scaling]:
    """Return one measurement per group: the configured tp, pp and cp, with 1, 2, 4, ... replicas of it.

    Each replica scores as many samples as a single one would. Raises LayoutError if the layout needs more ranks than
    most_ranks, WorkerError with the cause if a rank fails.
    """
    parallel = config.parallel
    per_replica = parallel.tp * parallel.pp * parallel.cp
    sizes = [per_replica * count for count in _GROUPS if per_replica * count <= most_ranks]
    if not sizes:
        raise LayoutError(
            f"--ranks {most_ranks} is less than parallel.tp * pp * cp ({per_replica}); use --ranks "
            f"{per_replica} or more."
        )
    num_threads = max(1, (os.cpu_count() or 1) // sizes[-1])  # the same in every group
    return [_measure_group(config, size, size // per_replica, num_threads) for size in sizes]


def _measure_group(config: Config, size: int, num_replicas: int, num_threads: int) -> Scaling:
    layout = config.parallel.model_copy(update={"dp": num_replicas})
    layout.layout.validate()
    grown = config.model_copy(update={"parallel": layout})
    with tempfile.TemporaryDirectory() as directory:
        arguments = (grown, size, _free_port(), num_threads, directory)
        try:
            spawn(_rank, arguments, nprocs=size)
        except (ProcessRaisedException, ProcessExitedException) as error:
            raise WorkerError(f"bench with {size} ranks failed: {str(error).strip().splitlines()[-1]}") from error
        found = [json.loads((Path(directory) / f"{rank}.json").read_text()) for rank in range(size)]
    slowest = max(entry["seconds"] for entry in found)
    return Scaling(**{**found[0], "seconds": slowest})


def _rank(rank: int, config: Config, size: int, port: int, num_threads: int, directory: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(num_threads)
    with joined(config):
        measured = _score(config, size)
        (Path(directory) / f"{rank}.json").write_text(json.dumps(asdict(measured)))
        if size > 1:
            torch.distributed.barrier()


def _score(config: Config, size: int) -> Scaling:
    from plop_dist.backends.hf.load import load_hf_config, load_tokenizer

    data = config.data
    tokenizer = load_tokenizer(config.model)
    samples = tokenize(select_rows(load_rows(data.path, data.split), data), data, tokenizer)
    model = load(BACKENDS, config.parallel.backend).load(config)
    replicas, per_step = model.groups.num_replicas, model.micro_batches_per_step
    # As many samples for every replica as for one: neighbours in length, so that replicas do the same work.
    samples = [sample for sample in samples for _ in range(replicas)]
    lengths = [len(sample) for sample in samples]
    plan = plan_steps(lengths, data.batch_size, replicas, per_step, uniform=True, in_order=False)[:_MOST_STEPS]
    options = {"pad_id": tokenizer.pad_token_id, "side": tokenizer.padding_side}
    steps = [step_micro_batches(samples, step, model.groups.replica, **options) for step in plan]
    collector = Collector(model)
    traffic = collector.reducer.traffic
    with collector.attached():
        collector.step(steps[0])  # warms up
        before = Traffic(traffic.num_collectives, traffic.num_bytes)
        started = time.perf_counter()
        totals = add_totals([collector.step(step) for step in steps], collector.owned)
        seconds = time.perf_counter() - started
    in_steps = Traffic(traffic.num_collectives - before.num_collectives, traffic.num_bytes - before.num_bytes)
    fixed = _traffic_without_steps(model, config, totals, len(samples))
    batches = [batch for step in steps for batch in step]
    parallel = config.parallel
    axes = [
        f"{axis} {getattr(parallel, axis)}" for axis in ("tp", "pp", "cp", "ep", "dp") if getattr(parallel, axis) > 1
    ]
    return Scaling(
        num_ranks=size,
        layout=", ".join(axes) or "one rank",
        num_replicas=replicas,
        num_layers=load_hf_config(config.model).get_text_config().num_hidden_layers,
        num_modules=sum(len(site.projections) for site in model.sites),
        num_micro_batches=len(batches),
        num_tokens=sum(int((batch.sample_ids >= 0).sum()) for batch in batches),
        num_padded_tokens=sum(batch.sample_ids.numel() for batch in batches),
        seconds=seconds,
        num_collectives=in_steps.num_collectives,
        num_bytes=in_steps.num_bytes,
        num_fixed_collectives=fixed.num_collectives,
        num_fixed_bytes=fixed.num_bytes,
    )


def _traffic_without_steps(model: ScorableModel, config: Config, totals: SampleTotals, num_samples: int) -> Traffic:
    """Return what scoring communicates before and after its steps: names, baselines, the merge of the sums."""
    reducer = Reducer(model.groups)
    fqns = [projection.fqn for projection in reducer.merge_projections(model.sites)]
    compute_baselines(model, config.estimator, reducer, fqns)
    reducer.merge_totals(totals, fqns, np.arange(num_samples))
    return reducer.traffic


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
