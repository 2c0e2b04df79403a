"""What scoring costs: against a plain forward pass, with and without the head, and the paper's own script."""

# T tokens, I in_features, O out_features

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

from plop_dist.config.schema import Config, EstimatorConfig, ParallelConfig
from plop_dist.costs import peak
from plop_dist.costs.scaling import Scaling, measure_scaling
from plop_dist.data.rows import load_rows
from plop_dist.data.samples import plan_steps, select_rows, step_micro_batches, tokenize
from plop_dist.measure.baseline import compute_baselines
from plop_dist.measure.collector import Collector
from plop_dist.measure.norms import directions
from plop_dist.measure.protocols import MicroBatch, ScorableModel
from plop_dist.measure.weight_sums import float_blocks

WITH_LOGITS, HEADLESS, SCORING, STRAIGHTFORWARD = "forward with logits", "forward", "scoring", "straightforward"
VARIANTS = (WITH_LOGITS, HEADLESS, SCORING, STRAIGHTFORWARD)
_MOST_MICRO_BATCHES = 4


@dataclass(frozen=True)
class Cost:
    """One variant over all micro-batches: median seconds, median CPU seconds of the process, and peak memory.

    peak_bytes: max RSS of a process that runs nothing else, the weights included; on CUDA what the allocator held.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Bench:
    """What `plop-dist bench` prints. costs: by variant; baseline_seconds: once per weight, whatever the data.

    product_seconds: of these, what multiplying the weights by their directions takes alone; None for an estimator that
    draws none.
    """

    model: str
    device: str
    num_threads: int
    num_modules: int
    num_tokens: int
    num_micro_batches: int
    repeats: int
    costs: dict[str, Cost]
    baseline_seconds: float
    product_seconds: float | None
    scaling: tuple[Scaling, ...] = ()

    def ratio(self, variant: str, other: str, what: str = "seconds") -> float:
        """Return how many times the cost of `other` that of `variant` is."""
        return getattr(self.costs[variant], what) / getattr(self.costs[other], what)

    @property
    def baseline_ratio(self) -> float | None:
        """How many times the matmul of their directions the baselines take."""
        return None if self.product_seconds is None else self.baseline_seconds / self.product_seconds


def run_bench(config: Config, *, ranks: int = 1, repeats: int = 5) -> Bench:
    """Return the measurements: one process, every repeat runs all variants on each micro-batch in turn.

    ranks: above 1, also groups of 1, 2, 4, ... ranks up to it (see scaling). The micro-batches are spread over the
    lengths that the configured data has. Raises UserError for bad input.
    """
    single = config.model_copy(update={"parallel": ParallelConfig()})
    scaling = measure_scaling(config, ranks) if ranks > 1 else ()
    peaks = {variant: measure_peak(single, variant) for variant in VARIANTS}
    subject = Subject(single)
    times = measure_times(subject, repeats)
    baseline_seconds, product_seconds = measure_baselines(subject, config.estimator, repeats)
    return Bench(
        model=config.model.name_or_path,
        device=str(subject.model.device),
        num_threads=torch.get_num_threads(),
        num_modules=len(subject.fqns),
        num_tokens=sum(int(batch.attention_mask.sum()) for batch in subject.micro_batches),
        num_micro_batches=len(subject.micro_batches),
        repeats=repeats,
        costs={variant: Cost(*times[variant], peaks[variant]) for variant in VARIANTS},
        baseline_seconds=baseline_seconds,
        product_seconds=product_seconds,
        scaling=tuple(scaling),
    )


class Subject:
    """A model loaded whole, the micro-batches, and one function per variant that runs a micro-batch."""

    def __init__(self, config: Config) -> None:
        from plop_dist.backends.hf.load import load_model, load_tokenizer, needs_head
        from plop_dist.backends.hf.model import HFModel, pick_device
        from plop_dist.backends.hf.whole import whole_sites

        tokenizer = load_tokenizer(config.model)
        data = config.data
        samples = tokenize(select_rows(load_rows(data.path, data.split), data), data, tokenizer)
        self.micro_batches = spread_micro_batches(samples, data.batch_size, tokenizer)
        module = load_model(config.model).to(pick_device())
        with_head = needs_head(config.placement.exclude)
        sites = whole_sites(module, with_head)
        self.module = module
        self.model: ScorableModel = HFModel(module, sites, with_head=with_head)
        self._plain = {head: HFModel(module, sites, with_head=head) for head in (True, False)}
        self.collector = Collector(self.model)
        self.fqns = [projection.fqn for site in sites for projection in site.projections]

    def run(self, variant: str, micro_batch: MicroBatch) -> None:
        """Run one micro-batch; must be inside prepared(variant)."""
        if variant == SCORING:
            self.collector.step([micro_batch])
            return
        model = self._plain[variant != HEADLESS]
        with torch.no_grad():
            model.forward([micro_batch], lambda _: None)

    def prepared(self, variant: str) -> AbstractContextManager[Any]:
        """Keep the variant's hooks in place for the length of a block."""
        if variant == SCORING:
            return self.collector.attached()
        return straightforward(self.module) if variant == STRAIGHTFORWARD else nullcontext()


def measure_times(subject: Subject, repeats: int) -> dict[str, tuple[float, float]]:
    """Return (seconds, CPU seconds) per variant: the sum over micro-batches of medians over repeats.

    Variants take turns on every micro-batch, in an order that rotates, so that whatever else the machine does hits all.
    """
    measured: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for repeat in range(-1, repeats):  # the first round only warms up
        for number, micro_batch in enumerate(subject.micro_batches):
            turn = (repeat + number) % len(VARIANTS)
            for variant in (*VARIANTS[turn:], *VARIANTS[:turn]):
                with subject.prepared(variant):
                    _wait_for_device()
                    began = time.perf_counter(), time.process_time()
                    subject.run(variant, micro_batch)
                    _wait_for_device()
                    took = time.perf_counter() - began[0], time.process_time() - began[1]
                if repeat >= 0:
                    measured.setdefault((variant, number), []).append(took)
    medians = {key: [statistics.median(column) for column in zip(*took, strict=True)] for key, took in measured.items()}
    return {
        variant: (
            sum(median[0] for (name, _), median in medians.items() if name == variant),
            sum(median[1] for (name, _), median in medians.items() if name == variant),
        )
        for variant in VARIANTS
    }


def measure_baselines(subject: Subject, estimator: EstimatorConfig, repeats: int) -> tuple[float, float | None]:
    """Return the seconds of all baselines, and of the matmul of their directions alone: medians, taken in turn.

    The latter is None for an estimator without directions.
    """
    has_directions = estimator.baseline in ("control_variate", "gaussian")
    whole, products = [], []
    for repeat in range(-1, repeats):
        _wait_for_device()
        began = time.perf_counter()
        compute_baselines(subject.model, estimator, subject.collector.reducer, subject.fqns)
        took = time.perf_counter() - began, _time_products(subject.model, estimator) if has_directions else 0.0
        if repeat >= 0:  # the first round only warms up
            whole.append(took[0])
            products.append(took[1])
    return statistics.median(whole), statistics.median(products) if has_directions else None


def _time_products(model: ScorableModel, estimator: EstimatorConfig) -> float:
    """Return the seconds that every W u takes, (O, I) by (I, K), with W and u in memory as float32."""
    seconds = 0.0
    for site in model.sites:
        with site.weights() as weights:
            for local in weights:
                projection = local.projection
                u_KI = directions(estimator.seed, projection.fqn, estimator.num_directions, projection.in_features)
                u_IK = u_KI.to(local.weight.device).T
                for w_oI in float_blocks(local.weight):
                    _wait_for_device()
                    began = time.perf_counter()
                    _ = w_oI @ u_IK
                    _wait_for_device()
                    seconds += time.perf_counter() - began
    return seconds


def measure_peak(config: Config, variant: str) -> int:
    """Return the peak memory of one variant in bytes, in a process of its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, config, variant).result()


def spread_micro_batches(samples: Sequence[Sequence[int]], batch_size: int, tokenizer: Any) -> list[MicroBatch]:
    """Return a few micro-batches as scoring makes them, from the longest samples to the shortest."""
    plan = plan_steps([len(sample) for sample in samples], batch_size, 1, 1, uniform=False, in_order=False)
    most = min(_MOST_MICRO_BATCHES, len(plan))
    chosen = [plan[(len(plan) - 1) * number // max(most - 1, 1)] for number in range(most)]
    side, pad_id = tokenizer.padding_side, tokenizer.pad_token_id
    return [batch for step in chosen for batch in step_micro_batches(samples, step, 0, pad_id=pad_id, side=side)]


@contextmanager
def straightforward(module: nn.Module) -> Iterator[None]:
    """Measure each linear module as the paper's own script does, step by step, for the length of a block.

    Per module, the LM head included, and per batch, in float32: W over its root mean square, z and a Gaussian z~ over
    their norms, W z and W z~. Source: github.com/soufiane001/plop, src/metrics.py, calculate_nfn_scores.
    """
    handles = []

    def observe(linear: Any, args: tuple[Any, ...], output: Any) -> None:
        z_TI = args[0].float().flatten(0, -2)
        weight_OI = linear.weight.float()
        weight_OI = weight_OI / weight_OI.square().mean().sqrt()
        actual, baseline = (
            _norm(u_TI / _norm(u_TI) @ weight_OI.T).mean().item() for u_TI in (z_TI, torch.randn_like(z_TI))
        )
        nfns.append(actual / baseline)

    nfns: list[float] = []
    try:
        for child in module.modules():
            if isinstance(child, nn.Linear):
                handles.append(child.register_forward_hook(observe))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _norm(z_TI: Tensor) -> Tensor:
    return torch.linalg.vector_norm(z_TI, dim=-1, keepdim=True)


def _peak(config: Config, variant: str) -> int:
    subject = Subject(config)
    # Reads every weight page of a mapped checkpoint before the count begins.
    subject.run(HEADLESS, subject.micro_batches[-1])
    peak.begin()
    with subject.prepared(variant):
        for micro_batch in subject.micro_batches:
            subject.run(variant, micro_batch)
    return peak.read()


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
