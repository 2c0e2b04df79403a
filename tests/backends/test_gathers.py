"""A parameter that holds the matrices of many experts is gathered once for all of them, and no two at a time."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from plop_dist.config.schema import EstimatorConfig
from plop_dist.measure.baseline import compute_baselines
from plop_dist.measure.collectives import Reducer
from plop_dist.measure.protocols import ScorableModel
from tests.models import tiny
from tests.spawn import run_ranks

ESTIMATOR = EstimatorConfig(num_directions=4)


def baselines(model: ScorableModel) -> dict[str, float]:
    fqns = [projection.fqn for site in model.sites for projection in site.projections]
    found = compute_baselines(model, ESTIMATOR, Reducer(model.groups), fqns)
    return {fqn: baseline.value for fqn, baseline in found.items()}


def expected() -> dict[str, float]:
    from plop_dist.backends.hf.whole import whole_model

    return baselines(whole_model(tiny("mixtral"), with_head=True))


def names_of(module: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in module.named_parameters()}


def at_zero_three(rank: int) -> tuple[Counter[str], int, list[str]]:
    """Return how often each parameter was gathered, the most held at once, and in which order."""
    import deepspeed

    from plop_dist.backends.deepspeed.zero import wrap

    deepspeed.init_distributed(dist_backend="gloo")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    engine, *_ = deepspeed.initialize(model=tiny("mixtral"), config=config)
    names = names_of(engine.module)
    order: list[str] = []
    held = most = 0
    plain = deepspeed.zero.GatheredParameters

    @contextmanager
    def counted(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        nonlocal held, most
        order.extend(names[id(parameter)] for parameter in parameters)
        with plain(parameters):
            held += len(parameters)
            most = max(most, held)
            yield
        held -= len(parameters)

    deepspeed.zero.GatheredParameters = counted
    found = baselines(wrap(engine, ()))
    deepspeed.zero.GatheredParameters = plain
    assert found == pytest.approx(expected(), rel=1e-6)
    return Counter(order), most, order


def at_fsdp(rank: int) -> tuple[Counter[str], int, list[str]]:
    """The same for FSDP2."""
    from plop_dist.backends.torch.fsdp import wrap

    module: Any = tiny("mixtral")
    for part in (*module.model.layers, module):
        fully_shard(part)
    shapes = {parameter.to_local().data_ptr(): name for name, parameter in module.named_parameters()}
    order: list[str] = []
    alive: list[Any] = []
    most = 0
    plain = DTensor.full_tensor

    def counted(self: Any, **options: Any) -> Tensor:
        nonlocal most
        order.append(shapes[self.to_local().data_ptr()])
        whole = plain(self, **options)
        gc.collect()
        alive[:] = [reference for reference in alive if reference() is not None] + [weakref.ref(whole)]
        most = max(most, len(alive))
        return whole

    DTensor.full_tensor = counted  # type: ignore[method-assign]
    found = baselines(wrap(module, ()))
    DTensor.full_tensor = plain  # type: ignore[method-assign]
    assert found == pytest.approx(expected(), rel=1e-6)
    return Counter(order), most, order


@pytest.mark.slow
@pytest.mark.parametrize("job", [at_zero_three, at_fsdp])
def test_each_parameter_is_gathered_once_and_alone(job: Any) -> None:
    (counts, most, order), (_, most_of_other, order_of_other) = run_ranks(2, job)
    stacks = [
        f"model.layers.{layer}.mlp.experts.{name}" for layer in range(2) for name in ("gate_up_proj", "down_proj")
    ]
    assert {name: counts[name] for name in stacks} == dict.fromkeys(stacks, 1)
    assert set(counts.values()) == {1}
    assert most == most_of_other == 1
    assert order == order_of_other
    assert len(counts) == 2 * (4 + 1 + 2) + 1  # attention, router, stacks; the head
