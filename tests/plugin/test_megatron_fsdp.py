"""A model that Megatron's ways of FSDP have sharded is refused by name: in score, in apply, and where it is saved.

Their constructors want CUDA, so that the real classes stand here around a module without having sharded it; the
package megatron-fsdp, the same code for models of transformers, is simulated by a class of its module path.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import plop_dist
from plop_dist.errors import LayoutError
from tests.models import random_tokens, tiny

CORE = "megatron.core.distributed"
needs_core = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")


def around(cls: type, module: nn.Module) -> nn.Module:
    """Return a wrapper of this class around a module, made by nn.Module's constructor alone."""
    wrapper: Any = cls.__new__(cls)
    nn.Module.__init__(wrapper)
    wrapper.module = module
    return wrapper


def by_megatron_fsdp(model: nn.Module) -> Any:
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
    from megatron.core.distributed.fsdp.src.megatron_fsdp import MegatronFSDP

    return [around(FullyShardedDataParallel, around(MegatronFSDP, model))]


def by_torch_fsdp2(model: nn.Module) -> Any:
    from megatron.core.distributed import TorchFullyShardedDataParallel

    return [around(TorchFullyShardedDataParallel, model)]


def in_place(model: nn.Module) -> Any:
    from megatron.core.distributed.fsdp.src.megatron_fsdp.experimental.fully_shard import _attach_mixin

    _attach_mixin(model)  # what its fully_shard begins with
    return model


def by_the_package(model: nn.Module) -> Any:
    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)

    simulated = type("MegatronFSDP", (nn.Module,), {"__module__": "megatron_fsdp.megatron_fsdp", "forward": forward})
    return around(simulated, model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrapped", "name"),
    [
        pytest.param(by_megatron_fsdp, f"FullyShardedDataParallel of {CORE}.fsdp", marks=needs_core),
        pytest.param(by_torch_fsdp2, f"TorchFullyShardedDataParallel of {CORE}.torch_fully_sharded", marks=needs_core),
        pytest.param(in_place, rf"ExperimentalFsdp\w+ of {CORE}.fsdp", marks=needs_core),
        (by_the_package, "MegatronFSDP of megatron_fsdp.megatron_fsdp"),
    ],
)
def test_it_is_refused_by_name(tmp_path: Path, wrapped: Callable[[nn.Module], Any], name: str) -> None:
    batches = [{"input_ids": random_tokens(1, 5)}]
    placement = plop_dist.place(plop_dist.score(tiny("llama"), batches, num_directions=4), k=2)
    words = rf"sharded by Megatron's FSDP \({name}\S*\), .* call them before it is wrapped"
    model = wrapped(tiny("llama"))
    before = dict(vars(model[0] if isinstance(model, list) else model))
    with pytest.raises(LayoutError, match=words):
        plop_dist.score(model, batches)
    with pytest.raises(LayoutError, match=words):
        placement.apply(model)
    with pytest.raises(LayoutError, match=words):
        plop_dist.save_adapter(wrapped(placement.apply(tiny("llama"))), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    assert vars(model[0] if isinstance(model, list) else model).keys() == before.keys()
