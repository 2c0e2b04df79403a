"""Adapters put on a model whose weights lie on two ranks train like PEFT's in one process from the same beginning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import plop_dist
from plop_dist.errors import LayoutError, ModelError
from plop_dist.values.placement import Placement
from tests.models import random_tokens, save_tiny
from tests.plugin.hosts import load
from tests.spawn import run_ranks

NUM_STEPS = 3
LEARNING_RATE = 0.03
CLIP = 0.1  # so small that every step is clipped: a norm that misses a part shows
OPTIONS = {"r": 4, "lora_alpha": 16}


def rows(step: int) -> Tensor:
    return random_tokens(2, 9, seed=step)


def placed(model: Any) -> Placement:
    return plop_dist.place(plop_dist.score(model, [{"input_ids": random_tokens(2, 9, seed=99)}]), k=3)


def applied(model: Any, folder: Path, **options: Any) -> Any:
    torch.manual_seed(7)
    adapted = placed(model).apply(model, **OPTIONS, **options)
    plop_dist.save_adapter(adapted, folder / "start")
    return adapted


def by_plan(directory: Path, folder: Path) -> list[float]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = load(directory, attention_dropout=0.0, tp_plan="auto", device_mesh=mesh)
    with pytest.raises(LayoutError, match="use_dora is True, which adapters under transformers' tensor parallelism"):
        placed(model).apply(model, use_dora=True)
    torch.manual_seed(dist.get_rank())
    with pytest.raises(LayoutError, match=r"lora_dropout is 0.1, but the tensor-parallel ranks' random states differ"):
        placed(model).apply(model, lora_dropout=0.1)
    adapted = applied(model, folder, use_rslora=True)
    losses = _loop(adapted, lambda tokens: adapted(input_ids=tokens, labels=tokens).loss)
    plop_dist.save_adapter(adapted, folder / "end")
    return losses


def _engine_options(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": CLIP,
        **more,
    }


def by_autotp(directory: Path, folder: Path) -> list[float]:
    import deepspeed

    model: Any = load(directory, attention_dropout=0.0)
    engine: Any = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
        config=_engine_options(1, tensor_parallel={"autotp_size": 2}),
    )[0]
    with pytest.raises(LayoutError, match="init_lora_weights is 'gaussian', which adapters under AutoTP do not have"):
        placed(engine).apply(engine, init_lora_weights="gaussian")
    engine = applied(engine, folder)
    losses = []
    for step in range(NUM_STEPS):
        loss = engine(input_ids=rows(step), labels=rows(step)).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    plop_dist.save_adapter(engine, folder / "end")
    with pytest.raises(ModelError, match="has adapters already"):
        placed_before(folder).apply(engine)
    engine.destroy()
    return losses


def placed_before(folder: Path) -> Placement:
    """Return any placement: a model with adapters is refused whatever it is."""
    from tests.models import tiny

    return placed(tiny("llama"))


def by_pipeline(directory: Path, folder: Path) -> list[float]:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    from plop_dist.backends.deepspeed.stack import pipeline_layers

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model: Any = load(directory, attention_dropout=0.0)
    pipe = PipelineModule(
        layers=pipeline_layers(model), num_stages=2, loss_fn=loss, dynamic_shape=True, activation_checkpoint_interval=0,
        partition_method="type:DecoderLayer",
    )  # fmt: skip
    engine: Any = deepspeed.initialize(
        model=pipe, optimizer=torch.optim.SGD(pipe.parameters(), lr=LEARNING_RATE), config=_engine_options(0)
    )[0]
    engine = applied(engine, folder)
    losses = []
    for step in range(NUM_STEPS):
        tokens = rows(step)
        positions = torch.arange(9).expand_as(tokens)
        batch = (tokens, positions, torch.ones_like(tokens)), tokens
        losses.append(float(engine.train_batch(iter([batch]))))
    plop_dist.save_adapter(engine, folder / "end")
    engine.destroy()
    return losses


def by_megatron(directory: Path, folder: Path, *, tp: int, wrapped: bool) -> list[float]:
    from plop_dist.backends.megatron.backend import load_chunks
    from tests.backends.megatron.models import config, fresh

    chunks, _ = load_chunks(config(directory, tp=tp, dp=2 // tp))
    chunks = [_megatron_ddp(chunk) for chunk in chunks] if wrapped else chunks
    chunks = applied(chunks, folder)
    (chunk,) = chunks
    mine = slice(None) if tp == 2 else slice(dist.get_rank(), dist.get_rank() + 1)
    hidden, places = torch.ones(9, 9, dtype=torch.bool).triu(1)[None, None], torch.arange(9)[None]

    def loss(tokens: Tensor) -> Tensor:
        tokens = tokens[mine]
        return chunk(tokens, places.expand_as(tokens), hidden, labels=tokens.roll(-1, 1))[:, :-1].mean()

    chunk.train()
    losses = _loop(chunk, loss)
    plop_dist.save_adapter(chunks, folder / "end")
    fresh()
    if tp == 1:
        joined = torch.tensor(losses)
        dist.all_reduce(joined)
        losses = (joined / 2).tolist()
    return losses


def _megatron_ddp(chunk: Any) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    return DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk)


def _loop(model: Any, loss_of: Callable[[Tensor], Tensor]) -> list[float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    losses = []
    for step in range(NUM_STEPS):
        loss = loss_of(rows(step))
        loss.backward()
        losses.append(float(loss.detach()))
        if hasattr(model, "finish_grad_sync"):
            model.finish_grad_sync()
            for parameter in trained:
                parameter.grad = parameter.main_grad
        optimizer.step()
        optimizer.zero_grad()
        if hasattr(model, "zero_grad_buffer"):
            model.zero_grad_buffer()
    return losses


LAYOUTS: dict[str, tuple[Callable[[Path, Path], list[float]], float | None]] = {
    "tp_plan": (by_plan, None),
    "autotp": (by_autotp, CLIP),
    "pipeline": (by_pipeline, CLIP),
    "megatron_tp": (lambda directory, folder: by_megatron(directory, folder, tp=2, wrapped=False), None),
    "megatron_ddp": (lambda directory, folder: by_megatron(directory, folder, tp=1, wrapped=True), None),
}


def _job(rank: int, name: str, directory: Path, folder: Path) -> list[float]:
    return LAYOUTS[name][0](directory, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_train_like_one_process(tmp_path: Path, name: str) -> None:
    save_tiny("llama", tmp_path / "model")
    first, second = run_ranks(2, _job, name, tmp_path / "model", tmp_path)
    assert first == pytest.approx(second, rel=1e-6)
    base: Any = load(tmp_path / "model", attention_dropout=0.0)
    model: Any = PeftModel.from_pretrained(base, str(tmp_path / "start"), is_trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    expected = []
    for step in range(NUM_STEPS):
        loss = model(input_ids=rows(step), labels=rows(step)).loss
        loss.backward()
        expected.append(float(loss.detach()))
        if LAYOUTS[name][1] is not None:
            norm = nn.utils.clip_grad_norm_(trained, CLIP)
            assert norm > 2 * CLIP
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(tmp_path / "one"))
    assert first == pytest.approx(expected, rel=1e-5)
    start, found, wanted = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("start", "end", "one")
    )
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        assert float((value - wanted[key]).abs().max()) < 1e-5, key
    assert any(not torch.equal(value, start[key]) for key, value in found.items()), "nothing was trained"
    reloaded: Any = PeftModel.from_pretrained(load(tmp_path / "model"), str(tmp_path / "end")).eval()
    logits, reference = (one(rows(0)).logits.detach() for one in (reloaded, model.eval()))
    assert float((logits - reference).abs().max() / reference.abs().max()) < 1e-4
