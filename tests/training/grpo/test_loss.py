"""GRPO's loss, gradient and metrics, by loss type, equal TRL's on the same tokens; advantages too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from plop_dist.config.schema import TrainConfig
from plop_dist.training.batch import batch_loss
from plop_dist.training.grpo.advantages import advantages_of, total_rewards
from plop_dist.training.grpo.loss import LOSSES, GRPOObjective, token_weights
from plop_dist.training.grpo.metrics import Tally, add_sampler, is_metric
from plop_dist.training.logits import IGNORED
from tests.models import random_tokens, tiny, tiny_tokenizer

pytestmark = pytest.mark.slow  # TRL's import
NUM_PROMPT, NUM_COMPLETION, NUM_ROWS = 5, 7, 4
LENGTHS = torch.tensor([7, 3, 5, 6])  # of the completions
PROMPTS = torch.tensor([5, 2, 4, 3])  # lengths of the prompts


def unused(completions: list[str], **_: Any) -> list[float | None]:
    """TRL wants a reward, which computing a loss never calls."""
    raise AssertionError


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

    arguments = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=NUM_ROWS, num_generations=4,
        max_completion_length=NUM_COMPLETION, use_cpu=True, bf16=False, report_to="none", temperature=0.8,
        gradient_checkpointing=False,
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": ["a"]})
    made = GRPOTrainer(
        model=tiny("llama"), args=arguments, reward_funcs=[unused], train_dataset=rows,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    made.current_gradient_accumulation_steps = 1
    return made


def _columns(lengths: Tensor, width: int, side: str) -> Tensor:
    places = torch.arange(width)[None]
    return (places < lengths[:, None] if side == "right" else places >= width - lengths[:, None]).long()


def _theirs(tokens: Tensor, values: dict[str, Tensor], advantages: Tensor) -> dict[str, Tensor]:
    prompt_mask, mask = _columns(PROMPTS, NUM_PROMPT, "left"), _columns(LENGTHS, NUM_COMPLETION, "right")
    return {
        "prompt_ids": tokens[:, :NUM_PROMPT] * prompt_mask, "prompt_mask": prompt_mask,
        "completion_ids": tokens[:, NUM_PROMPT:] * mask, "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": values["old"],
        "ref_per_token_logps": values["reference"], "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": values["importance"],
    }  # fmt: skip


def _ours(tokens: Tensor, values: dict[str, Tensor], advantages: Tensor, train: TrainConfig) -> dict[str, Tensor]:
    """Return the same rows padded on the right, tensors at the place before their token."""
    width = NUM_PROMPT + NUM_COMPLETION
    batch = {"input_ids": torch.zeros(NUM_ROWS, width).long(), "attention_mask": torch.zeros(NUM_ROWS, width).long(),
             "labels": torch.full((NUM_ROWS, width), IGNORED)}  # fmt: skip
    batch["position_ids"] = torch.arange(width).expand(NUM_ROWS, width).contiguous()
    mask = torch.zeros(NUM_ROWS, width)
    moved = {name: torch.zeros(NUM_ROWS, width) for name in values}
    moved["importance"] += 1
    for row, (prompt, length) in enumerate(zip(PROMPTS.tolist(), LENGTHS.tolist(), strict=True)):
        ids = tokens[row, NUM_PROMPT - prompt : NUM_PROMPT + length]
        batch["input_ids"][row, : len(ids)], batch["attention_mask"][row, : len(ids)] = ids, 1
        batch["labels"][row, prompt : len(ids)] = ids[prompt:]
        mask[row, prompt - 1 : prompt - 1 + length] = 1
        for name, value in values.items():
            moved[name][row, prompt - 1 : prompt - 1 + length] = value[row, :length]
    weights = token_weights(train, mask, 1, int(mask.sum()))
    return {**batch, **moved, "weights": weights, "advantages": advantages[:, None].expand(NUM_ROWS, width) * mask}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("sampled_elsewhere", [False, True], ids=["model", "vllm"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_and_gradient_are_trls(trainer: Any, loss_type: str, level: str, sampled_elsewhere: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    tokens = random_tokens(NUM_ROWS, NUM_PROMPT + NUM_COMPLETION, seed=1)
    advantages = torch.tensor([1.2, -0.7, 0.4, -0.9])
    model, arguments = trainer.model, trainer.args
    trainer.loss_type = arguments.loss_type = loss_type
    trainer.importance_sampling_level = level
    trainer.epsilon_high, trainer.beta = 0.3, 0.05
    trainer.use_vllm = sampled_elsewhere
    shape = (NUM_ROWS, NUM_COMPLETION)
    mask = _columns(LENGTHS, NUM_COMPLETION, "right")
    inputs = _theirs(tokens, {"old": mask, "reference": mask, "importance": mask}, advantages)
    with torch.no_grad():
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        current, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, seen, NUM_COMPLETION)
    values = {name: current + 0.3 * torch.randn(shape, generator=generator) for name in ("old", "reference")}
    values["importance"] = torch.exp(0.2 * torch.randn(shape, generator=generator)) * mask + (1 - mask)
    if not sampled_elsewhere and loss_type == "vespo":
        values["importance"] = torch.ones(shape)

    model.zero_grad()
    trainer._metrics["train"].clear()
    model.train()
    expected = trainer._compute_loss(model, _theirs(tokens, values, advantages))
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    train = TrainConfig.model_validate(
        {"method": "grpo", "loss_type": loss_type, "epsilon_high": 0.3, "importance_sampling_level": level,
         "beta": 0.05, "temperature": 0.8, "max_completion_length": NUM_COMPLETION}
    )  # fmt: skip
    batch = _ours(tokens, values, advantages, train)
    if not sampled_elsewhere:
        batch.pop("importance")
    plain, objective = tiny("llama"), GRPOObjective(train)
    loss = batch_loss(plain, batch, objective)
    loss.backward()
    told = {name: value for name, [value] in trainer._metrics["train"].items() if is_metric(name)}
    assert {"kl", "entropy"} <= told.keys()
    assert objective.tally.take(dp_rank=0) == pytest.approx(told, rel=1e-5, abs=1e-7)
    assert objective.tally.take(dp_rank=0) == {}
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert scale > 0
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-5 * scale)


def test_the_samplers_differences_are_those_of_tokens_and_completions() -> None:
    mask = torch.tensor([[False, True, True, True], [False, True, False, False]])
    difference = torch.tensor([[9.0, 0.25, torch.nan, -0.5], [9.0, -0.75, 9.0, 9.0]])
    importance = torch.tensor([[0.5] * 4, [2.0] * 4])
    tally = Tally()
    for row in (0, 1):  # micro-batches of one completion: of the first, two tokens are told
        add_sampler(tally, difference[row : row + 1], importance[row : row + 1], mask[row : row + 1])
    assert tally.take(dp_rank=0) == {
        "sampling/sampling_logp_difference/mean": 0.5, "sampling/sampling_logp_difference/max": 0.75,
        "sampling/importance_sampling_ratio/min": 0.5, "sampling/importance_sampling_ratio/mean": 1.25,
        "sampling/importance_sampling_ratio/max": 2.0,
    }  # fmt: skip
    add_sampler(tally, difference[:1, 2:3], importance[:1], mask[:1, 2:3])
    # Differences of which the server has told none are not logged.
    assert all("importance" in name for name in tally.take(dp_rank=0))


REWARDS = torch.tensor(
    [[1.0, 0.0], [0.0, 2.0], [torch.nan, 1.0], [0.5, 0.5],
     [torch.nan, torch.nan], [3.0, -1.0], [2.0, 0.0], [torch.nan, torch.nan],
     [1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
)  # fmt: skip


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_advantages_are_trls(trainer: Any, scale_rewards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [2.0, 0.5]
    trainer.scale_rewards, trainer.reward_weights, trainer.use_vllm = scale_rewards, torch.tensor(weights), False
    trainer.beta = 0.0
    trainer.reward_func_names, trainer.reward_funcs = ["one", "two"], [unused, unused]
    trainer._logs["rewards"].update(one=[], two=[])
    completions = [[7, 8]] * len(REWARDS)
    generated = ([[5, 6]] * len(REWARDS), completions, None, ["x"] * len(REWARDS), None, {}, None, None)
    monkeypatch.setattr(trainer, "_generate", lambda prompts: generated)
    monkeypatch.setattr(trainer, "_calculate_rewards", lambda *_: REWARDS.clone())
    monkeypatch.setattr(trainer, "state", SimpleNamespace(global_step=0))
    trainer.model.train()
    expected = trainer._generate_and_score_completions([{"prompt": "a"}] * len(REWARDS))["advantages"]
    train = TrainConfig.model_validate({"num_generations": 4, "scale_rewards": scale_rewards})
    totals = total_rewards(REWARDS, weights)
    torch.testing.assert_close(advantages_of(totals, train), expected, rtol=1e-5, atol=1e-6)
    assert expected.abs().max() > 0.5
