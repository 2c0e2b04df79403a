"""What attach puts on a trainer's model trains on two ranks like PEFT's in one process on the joined batch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import plop_dist
from tests.models import random_tokens, save_tiny, tiny_tokenizer
from tests.plugin.hosts import load
from tests.spawn import run_ranks

trl = pytest.importorskip("trl")

NUM_STEPS = 4
LEARNING_RATE = 0.1
CLIP = 0.1  # so small that every step is clipped: a norm that misses a part shows
LENGTHS = (9, 5, 7, 12, 4, 8, 11, 6)  # unequal: the mean of the ranks' means is not the joined batch's
ZERO3 = {"zero_optimization": {"stage": 3}, "gradient_clipping": "auto", "train_micro_batch_size_per_gpu": "auto"}


def rows() -> list[list[int]]:
    """Return the rows of a data set, of which the ranks take one each in a step."""
    return [random_tokens(1, length, seed=number)[0].tolist() for number, length in enumerate(LENGTHS)]


def pairs() -> datasets.Dataset:
    """Return a prompt with a better and a worse answer to it in each row."""
    return datasets.Dataset.from_list(
        [{"prompt": f"{i} and {i + 1}", "chosen": f" is {2 * i + 1}", "rejected": f" are {i}0"} for i in range(8)]
    )


def settings(folder: Path, num_ranks: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": NUM_STEPS, "per_device_train_batch_size": 2 // num_ranks,
        "optim": "sgd", "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "max_grad_norm": CLIP,
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "save_strategy": "no", "train_sampling_strategy": "sequential", "gradient_checkpointing": False,
    }  # fmt: skip


def sft(directory: Path, folder: Path, num_ranks: int, **options: Any) -> Any:
    # The arguments come first: at ZeRO-3 they are what has the model loaded in parts.
    arguments = trl.SFTConfig(**settings(folder, num_ranks), **options)
    return trl.SFTTrainer(
        model=load(directory, attention_dropout=0.0), processing_class=tiny_tokenizer(), args=arguments,
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows()}),
    )  # fmt: skip


def sft_zero3(directory: Path, folder: Path, num_ranks: int) -> Any:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return sft(directory, folder, num_ranks, deepspeed={**ZERO3, "zero_allow_untested_optimizer": True})


def plain(directory: Path, folder: Path, num_ranks: int) -> Any:
    return Trainer(
        model=load(directory, attention_dropout=0.0), args=TrainingArguments(**settings(folder, num_ranks)),
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows()}), data_collator=collate,
    )  # fmt: skip


def collate(rows: Iterable[dict[str, list[int]]]) -> dict[str, Tensor]:
    lines = [torch.tensor(row["input_ids"]) for row in rows]
    pad = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(line) for line in lines], batch_first=True)
    return {
        "input_ids": pad(lines, batch_first=True),
        "attention_mask": mask,
        "labels": pad(lines, batch_first=True).masked_fill(mask == 0, -100),
    }


def dpo(directory: Path, folder: Path, num_ranks: int, model: Any = None) -> Any:
    return trl.DPOTrainer(
        model=model or load(directory, attention_dropout=0.0), processing_class=tiny_tokenizer(),
        args=trl.DPOConfig(**settings(folder, num_ranks)), train_dataset=pairs(),
    )  # fmt: skip


HOSTS = {"trainer": plain, "sft": sft, "dpo": dpo, "sft_zero3": sft_zero3}  # DeepSpeed's comes last: it leaves a mark
WRAPPERS = {"sft_zero3": "DeepSpeedEngine"}


def losses_of(host: Any) -> list[float]:
    host.train()
    return [entry["loss"] for entry in host.state.log_history if "loss" in entry]


def _job(rank: int, directory: Path, folder: Path) -> dict[str, list[float]]:
    from accelerate.state import AcceleratorState, PartialState

    found = {}
    for name, make in HOSTS.items():  # all in one pair of processes: importing what they need takes longest
        host = make(directory, folder / name, 2)
        torch.manual_seed(7 + rank)  # rank 0's draw is to win
        plop_dist.attach(host, k=3, r=4, lora_alpha=16)
        plop_dist.save_adapter(host.model, folder / name / "start")
        found[name] = losses_of(host)
        assert host.accelerator.num_processes == 2
        assert type(host.model_wrapped).__name__ == WRAPPERS.get(name, "DistributedDataParallel")
        plop_dist.save_adapter(host.model_wrapped, folder / name / "two")
        AcceleratorState._reset_state()
        PartialState._reset_state()
    return found


def train_in_one_process(model: Any) -> list[float]:
    """Return the losses of a loop of our own on the joined batches: each target token counts the same."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses, data = torch.optim.SGD(trained, lr=LEARNING_RATE), [], rows()
    for step in range(NUM_STEPS):
        batch = collate({"input_ids": row} for row in data[2 * step : 2 * step + 2])
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
        assert nn.utils.clip_grad_norm_(trained, CLIP) > 2 * CLIP
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """Return the folder with the model and each host's adapters, and the losses that both ranks have logged."""
    folder = tmp_path_factory.mktemp("attached")
    first, second = run_ranks(2, _job, save_tiny("llama", folder / "model"), folder)
    assert first == second
    return folder, first


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTS)
def test_two_ranks_train_like_one_process(name: str, trained: tuple[Path, dict[str, list[float]]]) -> None:
    directory, folder = trained[0] / "model", trained[0] / name
    base = load(directory, attention_dropout=0.0)
    model: Any = PeftModel.from_pretrained(base, str(folder / "start"), is_trainable=True)
    is_paired = name == "dpo"  # there the reference is TRL's own trainer, given PEFT's model
    expected = losses_of(dpo(directory, folder, 1, model)) if is_paired else train_in_one_process(model)
    assert trained[1][name] == pytest.approx(expected, rel=1e-5)
    if not is_paired:
        batches = [collate([{"input_ids": row}]) for row in rows()]
        placement = plop_dist.place(plop_dist.score(load(directory), batches), k=3)
        config: Any = PeftConfig.from_pretrained(str(folder / "two"))
        assert config.target_modules == {*placement.module_types}
    model.save_pretrained(str(folder / "one"))
    start, found, wanted = (load_file(folder / part / "adapter_model.safetensors") for part in ("start", "two", "one"))
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        assert float((value - wanted[key]).abs().max()) < 1e-5, key
    assert any(not torch.equal(value, start[key]) for key, value in found.items()), "nothing was trained"
