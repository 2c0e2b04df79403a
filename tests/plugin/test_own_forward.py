"""Models that only the host knows how to call, and ranks that nobody has joined yet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import plop_dist
from plop_dist.backends.record import Found
from plop_dist.errors import ConfigError, DataError, LayoutError, ModelError
from plop_dist.plugin.score import _check_call
from plop_dist.ranks import LAUNCHERS
from plop_dist.values.scores import Scores
from tests.models import random_tokens, save_tiny, tiny
from tests.spawn import run_ranks


def truth(model: nn.Module, run: Callable[[Any], Any], batches: list[Any], masks: list[Tensor] | None = None) -> Any:
    """Return the mean gain of every linear over all positions, or those of the masks."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    masks = masks or [torch.ones(1)] * len(batches)
    now = iter(masks)
    mask = masks[0]

    def note(path: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], _: Tensor) -> None:
            z = args[0].double()
            gains = (z @ module.weight.detach().double().T).norm(dim=-1) / z.norm(dim=-1)
            found[path].append(gains[mask] if mask.dtype == torch.bool else gains.reshape(-1))

        return hook

    linears = ((path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear))
    handles = [module.register_forward_hook(note(path)) for path, module in linears]
    with torch.no_grad():
        for batch in batches:
            mask = next(now)
            run(batch)
    for handle in handles:
        handle.remove()
    return {path: float(torch.cat(parts).mean()) for path, parts in found.items()}


def assert_gains(scores: Scores, expected: dict[str, float], at_least: int = 4) -> None:
    found = {module.fqn: module.gain for module in scores.modules}
    assert len(found) >= at_least
    assert found == pytest.approx({fqn: expected[fqn] for fqn in found}, rel=1e-5)


class Block(nn.Module):
    """A block of a diffusion transformer: adaptive norms from the time step, attention, a feed-forward network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 4 * width)
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, shift_2, scale_2 = self.modulation(functional.silu(time))[:, None].chunk(4, dim=-1)
        q, k, v = self.qkv_proj(self.norm(x) * (1 + scale) + shift).chunk(3, dim=-1)
        x = x + self.out_proj(functional.scaled_dot_product_attention(q, k, v))
        return x + self.down(functional.gelu(self.up(self.norm(x) * (1 + scale_2) + shift_2)))


class Diffusion(nn.Module):
    """A small diffusion transformer over 4 x 4 patches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Linear(12, 16)
        self.time = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(2))
        self.final = nn.Linear(16, 12)

    def forward(self, latents: Tensor, step: Tensor) -> Tensor:
        x, time = self.patches(latents), self.time(torch.cos(step[:, None] * torch.arange(8)))
        for block in self.blocks:
            x = block(x, time)
        return self.final(x)


def test_a_diffusion_transformer_is_scored_by_every_position_that_a_linear_sees() -> None:
    model = Diffusion()
    batches = [(torch.randn(rows, 16, 12) * 3, torch.rand(rows)) for rows in (3, 1, 2)]
    scores = plop_dist.score(model, batches, forward=lambda model, batch: model(*batch), num_directions=4)
    expected = truth(model, lambda batch: model(*batch), batches)
    assert_gains(scores, expected, at_least=len(expected))
    counts = {module.fqn: module.num_tokens for module in scores.modules}
    assert (counts["blocks.0.up"], counts["blocks.0.modulation"]) == (6 * 16, 6)
    assert scores.samples is not None
    assert len(scores.samples.sample_ids) == 6


def test_a_vision_transformer_is_scored_on_its_patches() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = ViTModel(ViTConfig(**sizes, num_attention_heads=2, image_size=16, patch_size=4)).eval()
    batches = [{"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(2)]
    with pytest.raises(DataError, match=r"no input_ids \(its keys: pixel_values\); .* forward="):
        plop_dist.score(model, batches)
    scores = plop_dist.score(model, batches, forward=lambda model, batch: model(**batch), num_directions=4)
    assert_gains(scores, truth(model, lambda batch: model(**batch), batches))


def test_a_mask_of_the_hosts_own_says_which_positions_count() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    tokens = torch.randint(1, 50, (3, 6))
    tokens[1, 4:] = tokens[2, 2:] = 0
    scores = plop_dist.score(
        model,
        [tokens, tokens[:2]],
        forward=lambda model, batch: model(batch),
        mask=lambda batch: batch != 0,
        num_directions=4,
    )
    masks = [tokens != 0, tokens[:2] != 0]
    assert_gains(scores, truth(model, model, [tokens, tokens[:2]], masks), at_least=2)
    assert {module.num_tokens for module in scores.modules} == {6 + 4 + 2 + 6 + 4}
    with pytest.raises(DataError, match=r"mask= gave shape \(3,\) for batches\[0\], expected \(batch, sequence\)"):
        plop_dist.score(model, [tokens], forward=lambda m, batch: m(batch), mask=lambda batch: batch[:, 0])


def test_a_text_model_keeps_its_padding_apart_under_the_hosts_forward() -> None:
    model, tokens = tiny("llama"), random_tokens(2, 6)
    batch = {"input_ids": tokens, "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])}
    plain = plop_dist.score(model, [batch], num_directions=4)
    own = plop_dist.score(model, [batch], forward=lambda model, batch: model(**batch), num_directions=4)
    assert {m.fqn: m.gain for m in own.modules} == pytest.approx({m.fqn: m.gain for m in plain.modules}, rel=1e-6)


def test_options_that_do_not_fit_the_model_are_refused() -> None:
    model = tiny("llama")
    scheduled = Found("megatron", "megatron", (model,), lambda exclude: None, has_schedule=True)  # type: ignore[arg-type,return-value]  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="run by that framework's own schedule; leave forward= out"):
        _check_call(scheduled, lambda model, batch: None, None, local=False)
    with pytest.raises(ConfigError, match="no rank can score it alone; leave local= out"):
        _check_call(scheduled, None, None, local=True)
    with pytest.raises(ConfigError, match="mask= without forward="):
        plop_dist.score(model, [{"input_ids": random_tokens(1, 4)}], mask=lambda batch: batch)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE=2"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS=4"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=2"),
        ({"PMI_SIZE": "3", "PMI_RANK": "0"}, "PMI_SIZE=3"),
        ({"SLURM_NTASKS": "4"}, None),  # an allocation, in which this process was started alone
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
    ],
)
def test_before_the_process_group_exists_no_rank_scores_by_itself(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], named: str | None
) -> None:
    names = ["WORLD_SIZE", "RANK", *(name for one in LAUNCHERS for name in (one.size, one.rank))]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    model, batches = tiny("llama"), [{"input_ids": random_tokens(1, 4)}]
    if named is None:
        assert plop_dist.score(model, batches, num_directions=4).modules
        return
    with pytest.raises(LayoutError, match=rf"before the process group exists, though {named} says"):
        plop_dist.score(model, batches)
    assert plop_dist.score(model, batches, num_directions=4, local=True).modules


def _score_alone(rank: int) -> tuple[dict[str, float], dict[str, Any]]:
    scores = plop_dist.score(
        tiny("llama"), [{"input_ids": random_tokens(1, 5, seed=rank)}], num_directions=4, local=True
    )
    return {module.fqn: module.gain for module in scores.modules}, scores.parallel


@pytest.mark.slow
def test_a_rank_that_means_it_scores_alone_beside_others() -> None:
    for rank, (gains, parallel) in enumerate(run_ranks(2, _score_alone)):
        alone = plop_dist.score(tiny("llama"), [{"input_ids": random_tokens(1, 5, seed=rank)}], num_directions=4)
        assert gains == pytest.approx({module.fqn: module.gain for module in alone.modules}, rel=1e-6)
        assert (parallel["dp"], parallel["cp"]) == (1, 1)


def _score_partitioned(rank: int, directory: Path) -> tuple[dict[str, float], dict[str, float], bool]:
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    partitioning = HfDeepSpeedConfig(settings)  # as Trainer does it: from_pretrained builds under zero.Init
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    del partitioning
    batches = [{"input_ids": random_tokens(2, 5 + rank, seed=rank)}] * (1 + rank)  # unequal shares
    scores = plop_dist.score(model, batches, num_directions=4)
    is_released = all(parameter.numel() == 0 for parameter in model.parameters())
    found = {module.fqn: module for module in scores.modules}
    return (
        {fqn: module.gain for fqn, module in found.items()},
        {fqn: module.baseline for fqn, module in found.items()},
        is_released,
    )


@pytest.mark.slow
def test_a_model_under_zero_init_is_scored_without_an_engine(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    batches = [{"input_ids": random_tokens(2, 5 + rank, seed=rank)} for rank in (0, 1, 1)]
    expected = {module.fqn: module for module in plop_dist.score(tiny("mixtral"), batches, num_directions=4).modules}
    for gains, baselines, is_released in run_ranks(2, _score_partitioned, tmp_path):
        assert gains == pytest.approx({fqn: module.gain for fqn, module in expected.items()}, rel=1e-5)
        assert baselines == pytest.approx({fqn: module.baseline for fqn, module in expected.items()}, rel=1e-6)
        assert is_released


T5: dict[str, Any] = {"vocab_size": 256, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4,
      "decoder_start_token_id": 0}  # fmt: skip


def test_of_two_texts_every_token_counts_and_padding_is_refused() -> None:
    model = T5ForConditionalGeneration(T5Config(**T5)).eval()
    batch = {"input_ids": random_tokens(2, 9), "labels": random_tokens(2, 6)}
    run = lambda model, batch: model(**batch)  # noqa: E731
    scores = plop_dist.score(model, [batch], forward=run)
    expected = truth(model, lambda batch: model(**batch), [batch])
    assert_gains(scores, {path: gain for path, gain in expected.items() if path != "lm_head"}, at_least=16)
    # As long as the encoder's text, so that its mask would fit the decoder's tokens.
    labels = random_tokens(2, 9)
    mask = torch.ones_like(labels)
    mask[0, 5:] = 0
    ends = {"attention_mask": mask}, {"labels": labels.where(mask == 1, -100)}, {"decoder_attention_mask": mask}
    for padding in ends:
        with pytest.raises(DataError, match=r"encoder and a decoder, .* without padding, one per batch where"):
            plop_dist.score(model, [{**batch, "labels": labels, **padding}], forward=run)


def test_an_encoder_decoder_model_inside_a_hosts_own_needs_its_labels() -> None:
    class Host(nn.Module):
        """Trains by the loss of a model inside."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = BartForConditionalGeneration(
                BartConfig(vocab_size=256, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                           decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=40)
            )  # fmt: skip

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Any = None) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss

    batch = {"input_ids": random_tokens(1, 9), "labels": random_tokens(1, 6)}
    with pytest.raises(ModelError, match=r"Host is an encoder-decoder model, .*score it by score\(model, .*forward="):
        plop_dist.score(Host(), [batch])
