"""Adapters put on in a host's layout train like PEFT's in one process on the joined batch, and are saved as PEFT's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import plop_dist
from plop_dist.errors import LayoutError, ModelError, PlacementError, RunDirError
from plop_dist.values.placement import Placement
from tests.models import random_tokens, save_tiny, tiny
from tests.plugin.hosts import load, train_in_one_process
from tests.spawn import run_ranks

NUM_STEPS = 4
LEARNING_RATE = 0.1
OPTIONS = {"r": 4, "lora_alpha": 16}
PARAMETRISED = "model.layers.0.self_attn.q_proj"  # of a type that is chosen


def rows(step: int) -> Tensor:
    """Return the joined batch of a step, two rows, one for each rank."""
    return random_tokens(2, 9, seed=step)


def placed(model: Any) -> Placement:
    return plop_dist.place(plop_dist.score(model, [{"input_ids": random_tokens(2, 9, seed=99)}]), k=3)


def seeded(model: Any, placement: Placement) -> Any:
    torch.manual_seed(7 + (dist.get_rank() if dist.is_initialized() else 0))  # rank 0's draw is to win
    return placement.apply(model, **OPTIONS)


def train(model: Any, num_micro_batches: int = 1) -> list[float]:
    """Return the losses of an ordinary loop over what apply gave back, each rank on its row."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    losses = []
    for step in range(NUM_STEPS):
        tokens = rows(step)[dist.get_rank()][None]
        for _ in range(num_micro_batches):
            loss = model(input_ids=tokens, labels=tokens).loss
            (loss / num_micro_batches).backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return _means(losses)


def _means(losses: Sequence[Tensor]) -> list[float]:
    means = torch.stack([*losses])
    dist.all_reduce(means)
    return (means / dist.get_world_size()).tolist()


def by_ddp(directory: Path) -> tuple[Any, list[float]]:
    model = nn.parallel.DistributedDataParallel(load(directory, attention_dropout=0.0))
    adapted = seeded(model, placed(model))
    assert isinstance(adapted, nn.parallel.DistributedDataParallel)
    return adapted, train(adapted)


class Same(nn.Module):
    """A parametrisation that changes nothing, so that the reference can do without."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight


def by_fsdp2(
    directory: Path, axes: Mapping[str, int] | None = None, parametrised: str | None = None
) -> tuple[Any, list[float]]:
    """Train under fully_shard, over a mesh of these axes and their sizes, or over torch's own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = None if axes is None else init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    model: Any = load(directory, attention_dropout=0.0)
    if parametrised is not None:
        register_parametrization(model.get_submodule(parametrised), "weight", Same())
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    adapted = seeded(model, placed(model))
    assert adapted is model
    losses = train(adapted, num_micro_batches=2)
    assert not any(p.grad is not None for p in adapted.parameters() if not p.requires_grad)
    return adapted, losses


def by_zero(directory: Path, stage: int, client: bool) -> tuple[Any, list[float]]:
    import deepspeed

    options: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # by default DeepSpeed clips at 1
    }
    model: Any = load(directory, attention_dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE) if client else None
    if not client:
        options["optimizer"] = {"type": "SGD", "params": {"lr": LEARNING_RATE}}
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=options, optimizer=optimizer
    )
    engine = seeded(engine, placed(engine))
    losses = []
    for step in range(NUM_STEPS):
        tokens = rows(step)[dist.get_rank()][None]
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return engine, _means(losses)


LAYOUTS: dict[str, Callable[[Path], tuple[Any, list[float]]]] = {
    "ddp": by_ddp,
    "fsdp2": by_fsdp2,
    "fsdp2_named": lambda directory: by_fsdp2(directory, {"dp_shard": 2}),
    "fsdp2_parametrised": lambda directory: by_fsdp2(directory, {"dp_shard": 2}, PARAMETRISED),
    "hsdp": lambda directory: by_fsdp2(directory, {"replicate": 2, "shard": 1}),
    "zero1": lambda directory: by_zero(directory, 1, client=True),
    "zero2": lambda directory: by_zero(directory, 2, client=False),
    "zero3": lambda directory: by_zero(directory, 3, client=True),
}


def _job(rank: int, directory: Path, folder: Path) -> dict[str, list[float]]:
    found = {}
    for name, run in LAYOUTS.items():
        model, found[name] = run(directory)
        plop_dist.save_adapter(model, folder / name)
        with pytest.raises(ModelError, match="has adapters already"):
            placed(tiny("llama")).apply(model)
        if hasattr(model, "destroy"):
            model.destroy()
    (folder / "file").write_text("no folder")
    with pytest.raises(RunDirError, match="file"):
        plop_dist.save_adapter(placed(tiny("llama")).apply(tiny("llama")), folder / "file")
    scores = plop_dist.score(tiny("llama"), [{"input_ids": random_tokens(1, 9)}])
    with pytest.raises(LayoutError, match=r"placements differ among ranks: module_types .* on rank 1"):
        plop_dist.place(scores, k=1 + rank).apply(tiny("llama"))
    return found


@pytest.mark.slow
def test_two_ranks_train_like_one_process(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    first, second = run_ranks(2, _job, tmp_path / "model", tmp_path / "adapters")
    assert first == second
    base: Any = load(tmp_path / "model", attention_dropout=0.0)
    placement = placed(base)
    torch.manual_seed(7)
    model = get_peft_model(base, placement.to_peft(**OPTIONS))
    expected = train_in_one_process(model, [rows(step) for step in range(NUM_STEPS)], LEARNING_RATE)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-2), "nothing was trained"
    model.save_pretrained(str(tmp_path / "one"))
    reference = load_file(tmp_path / "one" / "adapter_model.safetensors")
    for name, losses in first.items():
        assert losses == pytest.approx(expected, rel=1e-5), name
        weights = load_file(tmp_path / "adapters" / name / "adapter_model.safetensors")
        assert weights.keys() == reference.keys()
        for key, value in weights.items():
            assert float((value - reference[key]).abs().max()) < 1e-5, (name, key)
        loaded: Any = PeftModel.from_pretrained(load(tmp_path / "model"), str(tmp_path / "adapters" / name)).eval()
        found, wanted = (one(rows(0)).logits.detach() for one in (loaded, model.eval()))
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4


def test_one_process_gets_pefts_model() -> None:
    model = tiny("llama")
    placement = placed(model)
    adapted = placement.apply(model, r=2, use_rslora=True, lora_dropout=0.1)
    assert isinstance(adapted, PeftModel)
    config = adapted.peft_config["default"]
    assert (config.r, config.use_rslora, config.lora_dropout) == (2, True, 0.1)
    wrapped = {path for path, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert wrapped == {f"base_model.model.{fqn}" for fqn in placement.modules}


def test_another_model_is_refused() -> None:
    placement = placed(tiny("llama"))
    other: Any = tiny("llama")
    del other.model.layers[1:]
    with pytest.raises(PlacementError, match=r"has no module 'model.layers.1"):
        placement.apply(other)
    assert not hasattr(other, "peft_config"), "it was touched"
    more: Any = tiny("llama", num_hidden_layers=3)
    with pytest.raises(PlacementError, match=r"'model.layers.2\S*' got one without being chosen"):
        placement.apply(more)
    with pytest.raises(ModelError, match="without adapters of PEFT"):
        plop_dist.save_adapter(tiny("llama"), "unused")
