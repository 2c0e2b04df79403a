"""Classifiers and reward models: the head is trained with the adapters as PEFT does in the task, or it is spoken of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import plop_dist
from plop_dist.errors import LayoutError
from plop_dist.training.adapters.placed import check_options
from plop_dist.values.placement import Placement
from tests.backends.hf.test_heads import BERT, LLAMA
from tests.models import random_tokens, tiny_tokenizer
from tests.spawn import run_ranks

NUM_STEPS = 4
LEARNING_RATE = 0.1
OPTIONS = {"r": 4, "lora_alpha": 16}
NUM_LABELS = 3
HEADS = {
    "LlamaForTokenClassification": "score",
    "BertForSequenceClassification": "classifier",
    "BertForQuestionAnswering": "qa_outputs",
}


def made(name: str, **fields: Any) -> Any:
    own: Any = getattr(transformers, name)
    torch.manual_seed(0)
    return own(own.config_class(**{**(LLAMA if "Llama" in name else BERT), "num_labels": NUM_LABELS, **fields}))


def classifier() -> Any:
    return made("LlamaForSequenceClassification")


def rows(step: int) -> tuple[Tensor, Tensor]:
    """Return the joined batch of a step, two rows and their labels, one for each rank."""
    return random_tokens(2, 9, seed=step), torch.tensor([step % NUM_LABELS, (step + 1) % NUM_LABELS])


def placed(model: Any) -> Placement:
    return plop_dist.place(plop_dist.score(model, [{"input_ids": random_tokens(2, 9, seed=99)}]), k=3)


def applied(model: Any) -> Any:
    placement = placed(model)
    torch.manual_seed(7 + dist.get_rank())  # rank 0's draw is to win
    return placement.apply(model, **OPTIONS)


def train(model: Any) -> list[float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)
    losses = []
    for step in range(NUM_STEPS):
        tokens, labels = (part[dist.get_rank()][None] for part in rows(step))
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return means(losses)


def means(losses: list[Tensor]) -> list[float]:
    total = torch.stack(losses)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def by_ddp() -> tuple[Any, list[float]]:
    model = applied(nn.parallel.DistributedDataParallel(classifier()))
    return model, train(model)


def sharded(*own_units: str, **options: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = classifier()
    for part in (*model.model.layers, *(model.get_submodule(path) for path in own_units), model):
        fully_shard(part, **options)
    return model


def by_fsdp2() -> tuple[Any, list[float]]:
    model = applied(sharded())
    return model, train(model)


def by_zero(stage: int) -> tuple[Any, list[float]]:
    """Train in an engine; at stage 3 the adapters are put on before it."""
    import deepspeed

    options: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True, "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
    }  # fmt: skip
    if stage == 3:
        bare = deepspeed.initialize(model=classifier(), config=options)[0]
        with pytest.raises(LayoutError, match=r"\(classifier or score: .* ZeRO-3; call placement.apply\(\) before"):
            applied(bare)
        bare.destroy()
        engine = deepspeed.initialize(model=applied(classifier()), config=options)[0]
    else:
        engine = applied(deepspeed.initialize(model=classifier(), config=options)[0])
    losses = []
    for step in range(NUM_STEPS):
        tokens, labels = (part[dist.get_rank()][None] for part in rows(step))
        loss = engine(input_ids=tokens, labels=labels).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return engine, means(losses)


LAYOUTS: dict[str, Callable[[], tuple[Any, list[float]]]] = {
    "ddp": by_ddp,
    "fsdp2": by_fsdp2,
    "zero1": lambda: by_zero(1),
    "zero3": lambda: by_zero(3),
}


def reward_trainer(folder: Path, num_ranks: int, model: Any) -> Any:
    trl = pytest.importorskip("trl")
    pairs = [{"chosen": f"{i} and {i + 1} is {2 * i + 1}", "rejected": f"{i} and {i + 1} are {i}0"} for i in range(8)]
    return trl.RewardTrainer(
        model=model, processing_class=tiny_tokenizer(), train_dataset=datasets.Dataset.from_list(pairs),
        args=trl.RewardConfig(
            output_dir=str(folder), max_steps=NUM_STEPS, per_device_train_batch_size=2 // num_ranks, optim="sgd",
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1,
            report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no",
            train_sampling_strategy="sequential", gradient_checkpointing=False,
        ),
    )  # fmt: skip


def reward_model() -> Any:
    return made("LlamaForSequenceClassification", num_labels=1)


def losses_of(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _job(rank: int, folder: Path) -> tuple[dict[str, list[float]], list[float]]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    found = {}
    for name, run in LAYOUTS.items():
        model, found[name] = run()
        plop_dist.save_adapter(model, folder / name)
    with pytest.raises(LayoutError, match=r"copy of 'score' .* task_type=SEQ_CLS.* fully_shard was given that module"):
        applied(sharded("score"))
    in_bf16 = applied(sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)))
    train(in_bf16)
    trainer = reward_trainer(folder / "trainer", 2, reward_model())
    torch.manual_seed(7 + rank)
    plop_dist.attach(trainer, **OPTIONS)
    plop_dist.save_adapter(trainer.model, folder / "start")
    rewarded = losses_of(trainer)
    plop_dist.save_adapter(trainer.model_wrapped, folder / "reward")
    return found, rewarded


def assert_same(folder: Path, model: Any, head: str) -> None:
    """Hold what was saved against PEFT's own file of a model."""
    model.save_pretrained(str(folder.parent / "one"))
    wanted, found = (load_file(part / "adapter_model.safetensors") for part in (folder.parent / "one", folder))
    assert head in found
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        assert float((value - wanted[key]).abs().max()) < 1e-5, (folder.name, key)


@pytest.mark.slow
def test_two_ranks_train_the_head_like_one_process_of_peft(tmp_path: Path) -> None:
    (first, rewarded), (second, rewarded_too) = run_ranks(2, _job, tmp_path)
    assert (first, rewarded) == (second, rewarded_too)
    base = classifier()
    placement = placed(base)
    torch.manual_seed(7)
    model: Any = get_peft_model(base, placement.to_peft(**OPTIONS))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    expected = []
    for step in range(NUM_STEPS):
        tokens, labels = rows(step)
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        expected.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    head = "base_model.model.score.weight"
    trained = model.base_model.model.score.modules_to_save["default"].weight
    assert float((trained - classifier().score.weight).abs().max().detach()) > 1e-3, "the reference trains no head"
    for name, losses in first.items():
        assert losses == pytest.approx(expected, rel=1e-5), name
        assert_same(tmp_path / name, model, head)
        loaded: Any = PeftModel.from_pretrained(classifier(), str(tmp_path / name)).eval()
        found, wanted = (one(input_ids=rows(0)[0]).logits.detach() for one in (loaded, model.eval()))
        assert float((found - wanted).abs().max()) < 1e-4
    ours: Any = PeftModel.from_pretrained(reward_model(), str(tmp_path / "start"), is_trainable=True)
    assert rewarded == pytest.approx(losses_of(reward_trainer(tmp_path / "trainer_of_one", 1, ours)), rel=1e-5)
    assert_same(tmp_path / "reward", ours, head)


def test_a_reward_trainer_in_one_process_is_trls_with_pefts_model(tmp_path: Path) -> None:
    trainer = reward_trainer(tmp_path / "ours", 1, reward_model())
    placement = plop_dist.attach(trainer, **OPTIONS)
    assert "score" in {entry.fqn for entry in placement.source.left_out}
    plop_dist.save_adapter(trainer.model, tmp_path / "start")
    found = losses_of(trainer)
    by_peft = get_peft_model(reward_model(), placement.to_peft(**OPTIONS))
    by_peft.load_adapter(str(tmp_path / "start"), "default", is_trainable=True)
    assert found == losses_of(reward_trainer(tmp_path / "theirs", 1, by_peft))
    assert_same(plop_dist.save_adapter(trainer.model, tmp_path / "end"), by_peft, "base_model.model.score.weight")


@pytest.mark.parametrize("name", HEADS)
def test_heads_have_no_score_where_the_forward_runs_them(name: str) -> None:
    model = made(name, num_labels=2)
    batch = {"input_ids": random_tokens(2, 9)}
    scores = plop_dist.score(model, [batch], forward=lambda model, batch: model(**batch))
    head = HEADS[name]
    assert {entry.fqn: entry.reason for entry in scores.left_out}[head] == "no_tokens"
    adapted = plop_dist.place(scores, policy="all").apply(model)
    assert any(f".{head}.modules_to_save." in path for path, p in adapted.named_parameters() if p.requires_grad)


def all_real(batch: dict[str, Tensor]) -> Tensor:
    return torch.ones_like(batch["input_ids"].flatten(0, 1))


class OwnClass(nn.Module):
    """A host's own network, which transformers knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def test_a_class_that_writes_no_text_takes_adapters_and_a_frozen_head_is_spoken_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scores = plop_dist.score(OwnClass(), [torch.randn(4, 8)], forward=lambda model, x: model(x))
    assert isinstance(plop_dist.place(scores, policy="all", rank=2).apply(OwnClass()), PeftModel)
    assert not caplog.records
    choice, batch = made("BertForMultipleChoice"), {"input_ids": random_tokens(2, 9)[:, None]}
    with caplog.at_level(logging.WARNING):
        scores = plop_dist.score(choice, [batch], forward=lambda model, batch: model(**batch), mask=all_real)
        placement = plop_dist.place(scores, k=2, exclude=["classifier", "dense"])
        placement.apply(choice)
    assert "'classifier' of BertForMultipleChoice stays as it is; where it is new, pass modules_to_save" in caplog.text
    caplog.clear()
    adapted = placement.apply(made("BertForMultipleChoice"), modules_to_save=["classifier"])
    assert not caplog.records
    assert "base_model.model.classifier.modules_to_save.default.bias" in dict(adapted.named_parameters())


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_where_adapters_are_cut_a_task_with_a_head_is_refused(task: Any) -> None:
    with pytest.raises(LayoutError, match=rf"task_type is {task}, .*under AutoTP .*pass task_type=None"):
        check_options(LoraConfig(task_type=task), "AutoTP")
    check_options(LoraConfig(task_type=None), "AutoTP")
