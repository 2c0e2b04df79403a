"""What is adapted before a framework wraps it trains on two ranks like PEFT's in one process on the joined batch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

import plop_dist
from plop_dist.errors import ModelError
from tests.models import random_tokens, save_tiny
from tests.plugin.hosts import load
from tests.spawn import run_ranks

LIGHTNING = Path(__file__).parents[2] / ".cache" / "hosts" / "lightning"  # apart from .venv: pins in tests/hosts
NUM_STEPS = 4
LEARNING_RATE = 0.1
OPTIONS = {"r": 4, "lora_alpha": 16}
SEED = 7

Run = Callable[[int, Any, Path], list[float]]


def rows() -> list[Tensor]:
    """Return the rows of a data set, of which the ranks take one each in a step."""
    return [random_tokens(1, 9, seed=number)[0] for number in range(2 * NUM_STEPS)]


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}


def loader() -> Any:
    dataset: Any = rows()
    return DataLoader(dataset, batch_size=1, collate_fn=collate)


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=LEARNING_RATE)


def by_accelerate(rank: int, model: Any, folder: Path) -> list[float]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model, batches = plop_dist.adapt_for_accelerate(accelerator, model, loader(), k=3, **OPTIONS), loader()
    model, optimizer, batches = accelerator.prepare(model, optimizer_of(model), batches)
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with pytest.raises(ModelError, match=r"accelerator.prepare has wrapped already; call it before prepare"):
        plop_dist.adapt_for_accelerate(accelerator, model, loader())
    plop_dist.save_adapter(model, folder)
    return losses


def by_lightning(rank: int, model: Any, folder: Path) -> list[float]:
    sys.path.append(str(LIGHTNING))
    import lightning.pytorch as lightning

    losses = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss = self.model(**batch).loss
            losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self)

    callback = plop_dist.lightning_callback(k=3, **OPTIONS)
    trainer = lightning.Trainer(
        callbacks=[callback], max_epochs=1, accelerator="cpu", strategy="ddp", devices=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, loader())
    assert trainer.world_size == 2
    plop_dist.save_adapter(module.model, folder)
    return losses


def by_fsdp1(rank: int, model: Any, folder: Path) -> list[float]:
    """The way that the refusal of a wrapped model names."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped: Any = FullyShardedDataParallel(load(model.name_or_path), device_id=torch.device("cpu"))
    mine = [collate([row]) for row in rows()[rank::2]]
    placement = plop_dist.place(plop_dist.score(model, mine), k=3)
    for call in (placement.apply, lambda given: plop_dist.save_adapter(given, folder)):
        with pytest.raises(ModelError, match=r"FSDP1.* before it is wrapped \(then with use_orig_params=True"):
            call(wrapped)
    torch.manual_seed(SEED)
    adapted = placement.apply(model, **OPTIONS)
    outer = FullyShardedDataParallel(adapted, device_id=torch.device("cpu"), use_orig_params=True)
    optimizer, losses = optimizer_of(outer), []
    for batch in mine:
        loss = outer(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with FullyShardedDataParallel.summon_full_params(outer):
        plop_dist.save_adapter(adapted, folder)
    return losses


def _job(rank: int, run: Run, directory: Path, folder: Path) -> list[float]:
    model: Any = load(directory, attention_dropout=0.0)
    torch.manual_seed(SEED + rank)  # rank 0's draw is to win
    losses = torch.tensor(run(rank, model, folder))
    dist.all_reduce(losses)
    return (losses / 2).tolist()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("before_wrapping") / "model")


def train_in_one_process(directory: Path, folder: Path, is_shuffled: bool) -> list[float]:
    """Return the losses on the joined batches; folder gets the adapter."""
    base: Any = load(directory, attention_dropout=0.0)
    placement = plop_dist.place(plop_dist.score(base, loader()), k=3)
    torch.manual_seed(SEED)
    model: Any = get_peft_model(base, placement.to_peft(**OPTIONS))
    optimizer, losses, data = optimizer_of(model), [], rows()
    dataset: Any = data
    shares: list[Any] = [DistributedSampler(dataset, 2, rank, shuffle=is_shuffled) for rank in (0, 1)]
    for numbers in zip(*shares, strict=True):
        loss = model(**collate([data[number] for number in numbers])).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(folder))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("run", [by_accelerate, by_lightning, by_fsdp1])
def test_two_ranks_train_like_one_process(tmp_path: Path, directory: Path, run: Run) -> None:
    if run is by_lightning and not LIGHTNING.is_dir():
        pytest.skip("Lightning is not installed in .cache/hosts/lightning; make test does it")
    first, second = run_ranks(2, _job, run, directory, tmp_path / "two")
    # Lightning shuffles what a loader of several ranks trains on, whether or not the loader did.
    expected = train_in_one_process(directory, tmp_path / "one", is_shuffled=run is by_lightning)
    assert first == second == pytest.approx(expected, rel=1e-5)
    found, wanted = (PeftConfig.from_pretrained(str(tmp_path / name)) for name in ("two", "one"))
    assert found.target_modules == wanted.target_modules
    weights, reference = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one"))
    assert weights.keys() == reference.keys()
    for key, value in weights.items():
        assert float((value - reference[key]).abs().max()) < 1e-5, key
    assert all(bool(value.any()) for value in weights.values()), "nothing was trained"
