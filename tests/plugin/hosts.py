"""Training loops as hosts have them, each with calls into the plugin before and in the middle of a step."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.models import random_tokens

# The first call comes before any step, the second one between a backward pass and its optimizer step.
Call = Callable[[Any], None]
NUM_STEPS = 3
DROPOUT = 0.3


def load(directory: Path, **options: Any) -> nn.Module:
    """Return the model in training mode, with dropout, so that a disturbed random state shows in the next step."""
    options = {"attention_dropout": DROPOUT, "dtype": torch.float32, **options}
    return AutoModelForCausalLM.from_pretrained(directory, **options).train()


def train_in_one_process(model: Any, steps: Iterable[Tensor], learning_rate: float) -> list[float]:
    """Train what requires a gradient by SGD, one batch of token ids a step; the losses are what layouts are held to."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for tokens in steps:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def train_ddp(directory: Path, call: Call) -> list[Tensor]:
    """Return losses and final parameters of a DDP loop."""
    model = nn.parallel.DistributedDataParallel(load(directory))
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.05), call)


def train_fsdp2(directory: Path, call: Call) -> list[Tensor]:
    """The same under fully_shard: every layer, and the root."""
    from torch.distributed.fsdp import fully_shard

    model: Any = load(directory)
    for part in (*model.model.layers, model):
        fully_shard(part)
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.05), call)


def train_fsdp2_whole(directory: Path, call: Call) -> list[Tensor]:
    """The same with two micro-batches a step, between which every unit stays whole; one call in inference mode."""
    from torch.distributed.fsdp import fully_shard

    model: Any = load(directory)
    for part in (*model.model.layers, model):
        fully_shard(part)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    _seed(dist.get_rank())
    with torch.inference_mode():
        call(model)
    losses = []
    for step in range(NUM_STEPS):
        for is_last in (False, True):
            model.set_requires_gradient_sync(is_last)
            model.set_reshard_after_backward(is_last)
            tokens = random_tokens(2, 9, seed=10 * step + 2 * dist.get_rank() + is_last)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            losses.append(loss.detach())
            if step == 1 and not is_last:
                with _watched(model):
                    call(model)
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, *(_whole(parameter).clone() for parameter in model.parameters())]


def train_hf_tp(directory: Path, call: Call) -> list[Tensor]:
    """The same under transformers' own tensor parallelism: both ranks read the same tokens."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = load(directory, tp_plan="auto", device_mesh=mesh)
    return _train(model, torch.optim.SGD(model.parameters(), lr=0.05), call, same_tokens=True)


def train_zero3(directory: Path, call: Call) -> list[Tensor]:
    """The same in a DeepSpeed engine at stage 3, which a call may leave neither more nor less partitioned."""
    import deepspeed

    engine = _engine(load(directory), {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100}})

    def checked(model: Any) -> None:
        before = [parameter.ds_status for parameter in model.module.parameters()]
        call(model)
        assert [parameter.ds_status for parameter in model.module.parameters()] == before

    seen = _train(engine, None, checked)
    for parameter in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            seen.append(parameter.detach().clone())
    engine.destroy()
    return seen


def train_autotp(directory: Path, call: Call) -> list[Tensor]:
    """The same in a DeepSpeed engine with two tensor-parallel ranks."""
    engine = _engine(load(directory), {"zero_optimization": {"stage": 1}, "tensor_parallel": {"autotp_size": 2}})
    seen = _train(engine, None, call, same_tokens=True)
    seen += [parameter.detach().clone() for parameter in engine.module.parameters()]
    engine.destroy()
    return seen


def train_megatron(directory: Path, call: Call) -> list[Tensor]:
    """The same with Megatron's pipeline schedule at tp 2, pp 2."""
    from plop_dist.backends.megatron.backend import load_chunks
    from tests.backends.megatron.models import config, fresh

    chunks, _ = load_chunks(config(directory, tp=2, pp=2))
    (chunk,) = chunks
    for module in chunk.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = DROPOUT
        if hasattr(module, "hidden_dropout"):
            module.hidden_dropout = DROPOUT
    optimizer = torch.optim.SGD(chunk.parameters(), lr=0.05)
    seen = []
    _seed(0)
    with _watched(chunk):
        call(chunks)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        seen += _megatron_step(chunk, step)
        if step == 1:
            with _watched(chunk):
                call(chunks)
        optimizer.step()
    fresh()
    return [*seen, *(parameter.detach().clone() for parameter in chunk.parameters())]


def _megatron_step(chunk: nn.Module, step: int) -> list[Tensor]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)[None, None]
    places = torch.arange(9)[None].expand(2, -1)

    def forward(source: Iterator[Tensor], part: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        tokens = next(source)
        return part(tokens, places, hidden, labels=tokens.roll(-1, 1)), lambda losses: (losses.mean(), {"loss": losses})

    stored = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter([random_tokens(2, 9, seed=10 * step + part) for part in range(2)]),
        model=chunk,
        num_microbatches=2,
        seq_length=9,
        micro_batch_size=2,
        forward_only=False,
    )
    return [entry["loss"].detach() for entry in stored]


def _engine(module: nn.Module, settings: dict[str, Any]) -> Any:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return deepspeed.initialize(
        model=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.05),
        config={"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, **settings},
    )[0]


def _train(model: Any, optimizer: Any, call: Call, *, same_tokens: bool = False) -> list[Tensor]:
    """Return losses, and the parameters if there is an optimizer of our own (else the model is an engine)."""
    rank = 0 if same_tokens else dist.get_rank()
    _seed(rank)
    losses = []
    with _watched(model):
        call(model)
    for step in range(NUM_STEPS):
        tokens = random_tokens(2, 9, seed=10 * step + rank)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward() if optimizer else model.backward(loss)
        if step == 1:
            with _watched(model):
                call(model)
        (optimizer or model).step()
        if optimizer:
            optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *(_whole(parameter).clone() for parameter in model.parameters() if optimizer)]


@contextmanager
def _watched(model: nn.Module) -> Iterator[None]:
    """Fail if the block changes modes, hooks, gradients or random states."""
    before = _visible_state(model)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    copies = {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}
    yield
    after = _visible_state(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert _equal(value, after[name]), f"{name} is not as it was"
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name]
        assert name not in copies or _equal(parameter.grad, copies[name])


def _visible_state(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1],
        "torch": torch.get_rng_state(),
        "gradient mode": torch.is_grad_enabled(),
    }
    for path, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        state[path] = (module.training, [list(table) for table in hooks], "forward" in vars(module))
    return state


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(_whole(one), _whole(other))
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


def _whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def _seed(rank: int) -> None:
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(100 + rank)


def drawing(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches like a loader that shuffles: it uses up random numbers of every kind."""
    for batch in batches:
        random.random(), np.random.rand(), torch.rand(1)
        yield batch
