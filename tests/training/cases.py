"""One training problem for every engine: tiny model, rows, placement, and what plain PEFT makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plop_dist.backends.hf.linears import find_linears
from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config
from plop_dist.training.adapters.initial import set_initial
from plop_dist.training.adapters.shards import AdapterShard, peft_shards
from plop_dist.training.batch import IGNORED, Batch, count_targets, sum_token_losses
from plop_dist.training.engine import Data
from plop_dist.training.loop import learning_rate_at
from plop_dist.training.train import engine_name, train
from plop_dist.values.adapter_size import num_trainable_parameters
from plop_dist.values.names import natural_key
from plop_dist.values.placement import Placement
from plop_dist.values.scores import DataInfo, ModelInfo, ModuleScore, Scores, TypeScore
from tests.models import random_tokens

TYPES = ("v_proj", "up_proj", "down_proj")
CUT_AFTER = 7  # steps, and hence after the checkpoint of step 4
RESUMED_STEPS = [5, 6, 7, 8, 9, 10]


def make_config(
    model: str | Path, run_dir: str | Path, *, train: dict[str, Any] | None = None, **parallel: Any
) -> Config:
    """Return a configuration of 10 short steps with clipping that bites, warm-up and decay."""
    options = {"method": "sft", "max_steps": 10, "learning_rate": 0.01, "warmup_steps": 1, "max_grad_norm": 0.3,
               "micro_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 4, "seed": 5}  # fmt: skip
    return parse_config(
        {
            "run_dir": str(run_dir),
            "model": {"name_or_path": str(model), "dtype": "float32"},
            "data": {"path": "unused.jsonl"},
            "parallel": parallel,
            "train": {**options, **(train or {})},
        }
    )


def make_placement(model: torch.nn.Module, types: tuple[str, ...] = TYPES, rank: int = 4) -> Placement:
    """Return a placement of all modules of these types, with scores of its model that name every linear."""
    modules = [
        ModuleScore(**block.projection.model_dump(), num_tokens=1, gain=1.0, baseline=1.0, nfn=1.0)
        for linear in find_linears(model)
        for block in linear.blocks
        if block.projection.type != "lm_head"
    ]
    names = sorted({module.type for module in modules})
    scores = Scores(
        model=ModelInfo(name_or_path="tiny"), data=DataInfo(), estimator={}, parallel={}, modules=tuple(modules),
        types=tuple(TypeScore(type=t, num_modules=sum(m.type == t for m in modules), nfn=1.0) for t in names),
    )  # fmt: skip
    chosen = sorted((m for m in modules if m.type in types), key=lambda m: natural_key(m.fqn))
    return Placement(
        policy={}, module_types=types, modules=tuple(m.fqn for m in chosen), rank=rank, alpha=2 * rank,
        num_trainable_parameters=num_trainable_parameters(chosen, lambda module: rank),
    ).with_source(scores)  # fmt: skip


@dataclass
class Rows:
    """Data of random tokens: every sample has its own length and prompt."""

    micro_batch_size: int = 2
    length: int = 8
    held_out: list[Batch] = field(init=False)

    def __post_init__(self) -> None:
        self.held_out = [self.micro_batch(1000 + index) for index in range(3)]

    def micro_batch(self, index: int) -> Batch:
        """Return rows drawn from the micro-batch's number."""
        key = index
        ids = random_tokens(self.micro_batch_size, self.length, seed=key)
        mask = torch.ones_like(ids)
        labels = ids.clone()
        for row in range(self.micro_batch_size):
            mask[row, self.length - (key + row) % 3 :] = 0
            labels[row, : 1 + (key + row) % 4] = IGNORED
        labels[mask == 0] = IGNORED
        positions = torch.arange(self.length).expand_as(ids).contiguous()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions}


class Recorded(list):
    """Per AdamW step the clipped gradients by id of parameter, and the adapters they belong to."""

    shards: list[AdapterShard]


@contextmanager
def recorded_gradients() -> Iterator[Recorded]:
    """Yield a list that gets the gradients of every AdamW step, and the adapters made inside the block."""
    step_of, init_of = torch.optim.AdamW.step, AdapterShard.__init__
    seen = Recorded()
    seen.shards = []

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append({id(p): p.grad.detach().clone() for p in parameters})
        return step_of(self, *args, **kwargs)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        init_of(self, *args, **kwargs)
        seen.shards.append(self)

    torch.optim.AdamW.step, AdapterShard.__init__ = step, init  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        torch.optim.AdamW.step, AdapterShard.__init__ = step_of, init_of  # type: ignore[method-assign]


def gradients_of(seen: Recorded) -> list[dict[str, Tensor]]:
    """Return the whole clipped gradients of every step under PEFT's names. Collective over the shards' groups."""
    steps = []
    for gradients in seen:
        whole = {}
        for shard in seen.shards:
            A, B = shard.gather(gradients[id(shard.A)], gradients[id(shard.B)])
            whole[f"base_model.model.{shard.fqn}.lora_A.default.weight"] = A
            whole[f"base_model.model.{shard.fqn}.lora_B.default.weight"] = B
        steps.append(whole)
    return steps


def reference(
    model: torch.nn.Module, config: Config, placement: Placement, data: Data, per_step: int
) -> dict[str, Any]:
    """Return losses, norms, clipped gradients and adapters of plain PEFT training in this process, written out.

    per_step: micro-batches of data that one step takes.
    """
    from peft import get_peft_model

    settings = config.train
    model = get_peft_model(model, placement.to_peft())
    set_initial(peft_shards(model), settings.seed)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    out: dict[str, Any] = {"losses": [], "norms": [], "gradients": []}

    def total_loss(batches: Sequence[Batch]) -> tuple[Tensor, int]:
        losses = [
            sum_token_losses(model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits, b["labels"])
            for b in batches
        ]
        return torch.stack(losses).sum(), sum(count_targets(b) for b in batches)

    for step in range(settings.max_steps):
        loss, count = total_loss([data.micro_batch(index) for index in range(step * per_step, (step + 1) * per_step)])
        (loss / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
        out["gradients"].append({name: p.grad.clone() for name, p in parameters.items()})
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(settings, step)
        optimizer.step()
        optimizer.zero_grad()
        out["losses"].append(float(loss.detach() / count))
        out["norms"].append(float(norm))
    out["adapters"] = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        loss, count = total_loss(data.held_out)
    out["held_out_after"] = float(loss / count)
    return out


def assert_equal(name: str, found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Compare in relative terms, by the largest absolute value of what is expected."""
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    assert error <= tolerance, f"{name}: relative error {error:.2e}, {found.flatten()[:4]}, {expected.flatten()[:4]}"


def run_engine(name: str, directory: str, run: str, num_steps: int = 0, **options: Any) -> dict[str, Any]:
    """On one rank: train in a layout whose engine has this name, and return log entries and the summary.

    num_steps: train only so far and stop, as if killed after the step's checkpoint. Collective over all ranks.
    """
    config = make_config(Path(directory, "model"), Path(directory, run), **options)
    assert engine_name(config) == name
    placement = load_placement(directory)
    records: list[dict[str, Any]] = []

    def log(record: dict[str, Any]) -> None:
        records.append(record)
        if record["step"] == num_steps:
            raise KilledError

    try:
        result = train(config, placement, log, data=Rows())
    except KilledError:
        return {"records": records}
    return {"records": records, "result": result}


class KilledError(Exception):
    """Stands for a worker's death."""


def load_placement(directory: str | Path) -> Placement:
    """Return the placement that prepare() left beside the model."""
    return Placement.from_file(Path(directory, "placement.json"))


def prepare(
    directory: Path,
    family: str,
    types: tuple[str, ...] = TYPES,
    train: dict[str, Any] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Save tiny model, scores and placement in `directory` and return the reference run."""
    from tests.models import save_tiny, tiny

    save_tiny(family, directory / "model", **overrides)
    model = tiny(family, **overrides)
    placement = make_placement(model, types)
    placement.source.to_file(directory / "scores.json")
    placement.to_file(directory / "placement.json")
    return reference(model, make_config(directory / "model", directory, train=train), placement, Rows(), per_step=4)


def check_run(expected: dict[str, Any], found: dict[str, Any], directory: Path, family: str, **overrides: Any) -> None:
    """Assert that losses, norms, gradients, held-out loss and the saved adapter are those of the reference."""
    for step, gradients in enumerate(found.get("gradients", ())):
        for name, gradient in gradients.items():
            assert_equal(f"step {step} {name}", gradient, expected["gradients"][step][name])
    losses = [record["loss"] for record in found["records"]]
    assert_equal("loss", losses, expected["losses"][-len(losses) :])
    assert_equal("grad_norm", [record["grad_norm"] for record in found["records"]], expected["norms"][-len(losses) :])
    result = found["result"]
    assert_equal("held-out loss", result["held_out_after"], expected["held_out_after"])
    check_adapter(expected, Path(result["adapter"]), family, **overrides)


def check_adapter(expected: dict[str, Any], adapter: Path, family: str, **overrides: Any) -> None:
    """Assert that the adapter loads in plain PEFT, with the reference's weights and hence its logits."""
    from peft import PeftModel

    from tests.models import tiny

    model = PeftModel.from_pretrained(tiny(family, **overrides), adapter)
    loaded = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert loaded.keys() == expected["adapters"].keys()
    for name, weight in expected["adapters"].items():
        assert_equal(name, loaded[name].detach(), weight, tolerance=1e-3)
    with torch.no_grad():
        batch = Rows().held_out[0]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = sum_token_losses(logits, batch["labels"]) / count_targets(batch)
    assert torch.isfinite(loss)
