"""attach(trainer): scored on the trainer's own batches, which come as if nobody had looked at them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import plop_dist
from plop_dist.errors import ConfigError, LayoutError
from tests.models import random_tokens, tiny, tiny_tokenizer


class Rows(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = random_tokens(1, 5 + index % 4, seed=index)[0].tolist()
        tokens += [0] * (8 - len(tokens))
        mask = [int(token != 0) for token in tokens]
        labels = [token if real else -100 for token, real in zip(tokens, mask, strict=True)]
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def trainer(folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, report_to="none", use_cpu=True, seed=5,
        logging_steps=1, learning_rate=1e-2, disable_tqdm=True, save_strategy="no", **options,
    )  # fmt: skip
    return Trainer(model=tiny("llama").train(), args=arguments, train_dataset=Rows())


def losses(host: Trainer) -> list[float]:
    return [entry["loss"] for entry in host.state.log_history if "loss" in entry]


def test_the_trainers_model_is_adapted_and_its_batches_are_untouched(tmp_path: Path) -> None:
    host, by_hand = trainer(tmp_path / "one"), trainer(tmp_path / "other")
    state = torch.get_rng_state()
    placement = plop_dist.attach(host, k=2, r=4, num_samples=12, place={"exclude": ["lm_head", "q_proj"]})
    assert placement.policy["k"] == 2
    assert "q_proj" not in placement.module_types
    assert host.accelerator._dataloaders == []
    torch.set_rng_state(state)
    by_hand.model = by_hand.model_wrapped = placement.apply(by_hand.model, r=4)
    for one in (host, by_hand):
        torch.manual_seed(1)
        for path, parameter in one.model.named_parameters():
            if "lora_A" in path:
                torch.nn.init.normal_(parameter)
        one.train()
    assert losses(host) == losses(by_hand)
    assert len(losses(host)) == 3
    trained = {path.rsplit(".", 3)[0] for path, p in host.model.named_parameters() if p.requires_grad}
    assert trained == {f"base_model.model.{fqn}" for fqn in placement.modules}


def test_scores_are_those_of_the_trainers_rows(tmp_path: Path) -> None:
    host = trainer(tmp_path, data_seed=3)
    seen = plop_dist.attach(host, k=1, num_samples=24).source
    rows = [Rows()[index] for index in range(24)]
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
    expected = plop_dist.score(tiny("llama"), [batch])
    gains = {module.fqn: module.gain for module in expected.modules}
    assert {module.fqn: module.gain for module in seen.modules} == pytest.approx(gains, rel=1e-5)


def test_gradients_reach_adapters_below_checkpointed_blocks(tmp_path: Path) -> None:
    host = trainer(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    plop_dist.attach(host, r=2)
    host.train()
    moved = [float(p.detach().abs().max()) for path, p in host.model.named_parameters() if "lora_B" in path]
    assert moved
    assert min(moved) > 0


def test_prompts_are_scored_where_the_trainer_generates(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    tokenizer = tiny_tokenizer()
    model: Any = tiny("llama")
    prompts = [f"{i} and {i + 1}" for i in range(8)]
    import datasets

    host = trl.GRPOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, report_to="none", use_cpu=True,
            bf16=False,
        ),
    )  # fmt: skip
    placement = plop_dist.attach(host, k=2, r=2)
    num_tokens = placement.source.modules[0].num_tokens
    own = sum(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
    assert num_tokens % own == 0, "each prompt comes as often as it has completions"


def test_trainers_that_cannot_be_attached_to(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got a dict, which has no model"):
        plop_dist.attach({})
    host = trainer(tmp_path)
    host.create_optimizer()
    with pytest.raises(ConfigError, match="has an optimizer already"):
        plop_dist.attach(host)
    host = trainer(tmp_path)
    host.model_wrapped = torch.nn.Identity()
    with pytest.raises(LayoutError, match="wrapped already"):
        plop_dist.attach(host)
    host = trainer(tmp_path)
    host.get_train_dataloader = lambda: [{"pixels": torch.zeros(1)}]  # type: ignore[method-assign,return-value]
    with pytest.raises(ConfigError, match="which hold pixels and no input_ids"):
        plop_dist.attach(host)
