"""Whatever else a host's batches hold reaches the forward pass, or is refused by its name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import plop_dist
from plop_dist.errors import DataError
from plop_dist.values.scores import Scores
from tests.models import random_tokens, tiny

IMAGE = 120


def gains_of(model: nn.Module, *batches: Mapping[str, Any]) -> dict[str, float]:
    """Return the mean gain of every linear in the host's own forward pass: over the real tokens, (b, s).

    In towers and projectors over all that they see.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    mask = torch.ones(1)

    def note(path: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], _: Tensor) -> None:
            z_bsI = args[0].double()
            gains = (z_bsI @ module.weight.detach().double().T).norm(dim=-1) / z_bsI.norm(dim=-1)
            if "vision_tower" in path or "projector" in path:
                found[path].append(gains.flatten())
            elif z_bsI.shape[:-1] == mask.shape:
                found[path].append(gains[mask])

        return hook

    handles = [
        module.register_forward_hook(note(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0
            model(**batch)
    for handle in handles:
        handle.remove()
    return {path: float(torch.cat(rows).mean()) for path, rows in found.items()}


def assert_gains(scores: Scores, expected: Mapping[str, float]) -> None:
    found = {module.fqn: module.gain for module in scores.modules}
    assert len(found) > 3
    assert found == pytest.approx({fqn: expected[fqn] for fqn in found}, rel=1e-5)


def _bert() -> BertLMHeadModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return BertLMHeadModel(BertConfig(**sizes, num_attention_heads=4, is_decoder=True)).eval()


def _llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval()


def test_token_types_reach_the_forward_on_either_side_of_padding() -> None:
    model, tokens = _bert(), random_tokens(2, 7)
    batch = {
        "input_ids": tokens,
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]),
        "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 0, 1], [1, 0, 1, 0, 1, 0, 1]]),
    }
    scores = plop_dist.score(model, [batch], num_directions=4)
    assert_gains(scores, gains_of(model, batch))
    without = {key: batch[key] for key in ("input_ids", "attention_mask")}
    plain = plop_dist.score(model, [without], num_directions=4)
    assert max(abs(a.gain / b.gain - 1) for a, b in zip(scores.modules, plain.modules, strict=True)) > 1e-3


def test_images_reach_the_forward() -> None:
    model: Any = _llava()
    tokens = random_tokens(2, 9).clamp_max(IMAGE - 1)
    tokens[:, 1:5] = IMAGE  # four patches
    batch = {"input_ids": tokens, "pixel_values": torch.rand(2, 3, 8, 8) * 3}
    scores = plop_dist.score(model, [batch, {"input_ids": random_tokens(1, 4).clamp_max(119)}], num_directions=4)
    truth = gains_of(model, batch, {"input_ids": random_tokens(1, 4).clamp_max(119)})
    assert_gains(scores, truth)
    assert {module.part for module in scores.modules} == {"language", "vision", "projector"}


def test_lengths_of_packed_samples_keep_them_apart_without_positions() -> None:
    model, first, second = tiny("llama"), random_tokens(1, 5, seed=1), random_tokens(1, 7, seed=2)
    apart = plop_dist.score(model, [{"input_ids": first}, {"input_ids": second}], num_directions=4)
    packed: dict[str, Any] = {"input_ids": torch.cat([first, second], dim=1)}
    packed |= {"cu_seq_lens_q": torch.tensor([0, 5, 12], dtype=torch.int32), "max_length_q": 7, "max_length_k": 7}
    packed["cu_seq_lens_k"] = packed["cu_seq_lens_q"]
    found = plop_dist.score(model, [packed], num_directions=4)
    assert {m.fqn: m.gain for m in found.modules} == pytest.approx({m.fqn: m.gain for m in apart.modules}, rel=1e-5)
    for key, value, message in (
        ("cu_seq_lens_q", torch.tensor([0, 5, 11]), r"the number of tokens \(12\)"),
        ("cu_seq_lens_k", torch.tensor([0, 6, 12]), "differ"),
        ("position_ids", torch.arange(12)[None], "do not begin again"),
    ):
        with pytest.raises(DataError, match=message):
            plop_dist.score(model, [{**packed, key: value}])


class _TakesAnything(nn.Module):
    """A forward of which nobody can tell what it does with a key, around one that names its own."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.inner, self.named = tiny("llama"), named
        self.config = self.inner.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Any:
        return self.inner(input_ids, attention_mask=attention_mask)


def test_a_key_of_which_it_cannot_be_told_is_refused_by_its_name() -> None:
    model, batch = _TakesAnything(named=False), {"input_ids": random_tokens(2, 5)}
    expected = plop_dist.score(model, [batch], num_directions=4)
    with pytest.raises(DataError, match=r"batches\[1\] has 'steering', of which it cannot be told"):
        plop_dist.score(model, [batch, {**batch, "steering": torch.ones(2)}])
    for harmless in ({"labels": batch["input_ids"]}, {"text": ["a", "b"]}, {"num_items_in_batch": torch.tensor(3)}):
        assert plop_dist.score(model, [{**batch, **harmless}], num_directions=4).modules == expected.modules


def test_a_key_that_the_forward_does_not_take_changes_nothing() -> None:
    model: Any = _bert()
    batch = {"input_ids": random_tokens(2, 5)}
    model.forward = _without_more(model.forward)
    expected = plop_dist.score(model, [batch], num_directions=4)
    assert plop_dist.score(model, [{**batch, "length": torch.ones(2)}], num_directions=4).modules == expected.modules


def _without_more(forward: Any) -> Any:
    def bare(input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None) -> Any:
        return forward(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)

    return bare


def test_a_cache_of_earlier_tokens_is_refused_and_left_as_it_was() -> None:
    model, tokens = tiny("llama"), random_tokens(2, 9)
    with torch.no_grad():
        cache = model(tokens[:, :4], use_cache=True).past_key_values
    with pytest.raises(DataError, match=r"batches\[0\] has 'past_key_values', a DynamicCache: .*leave it out"):
        plop_dist.score(model, [{"input_ids": tokens[:, 4:], "past_key_values": cache}])
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize("side", ["begin", "end"])
def test_padding_that_only_labels_show_is_refused(side: str) -> None:
    model, tokens = tiny("llama"), random_tokens(2, 8)
    labels, padded = tokens.clone(), tokens.clone()
    places = slice(0, 3) if side == "begin" else slice(5, 8)
    labels[0, places], padded[0, places] = -100, 0
    for pad_id in (0, None):
        model.config.pad_token_id = pad_id
        with pytest.raises(DataError, match=f"rows that {side} with token 0 under labels of -100, 3 times"):
            plop_dist.score(model, [{"input_ids": padded, "labels": labels}])
    masked = {"input_ids": padded, "labels": labels, "attention_mask": (padded != 0).long()}
    assert plop_dist.score(model, [masked], num_directions=4).modules
    prompt = tokens.clone()
    prompt[:, :3] = -100  # a prompt, which no loss is made of
    assert plop_dist.score(model, [{"input_ids": tokens, "labels": prompt}], num_directions=4).modules


def test_one_batch_alone_is_refused_with_what_to_do() -> None:
    with pytest.raises(DataError, match="put one batch alone into a list"):
        plop_dist.score(tiny("llama"), {"input_ids": random_tokens(1, 4)})  # pyright: ignore[reportArgumentType]


def test_num_samples_ends_an_endless_iterator() -> None:
    drawn = 0

    def endless() -> Iterator[dict[str, Tensor]]:
        nonlocal drawn
        for batch in repeat({"input_ids": random_tokens(3, 4)}):
            drawn += 1
            yield batch

    scores = plop_dist.score(tiny("llama"), endless(), num_samples=7, num_directions=4)
    assert drawn == 3
    assert scores.samples is not None
    assert len(scores.samples.sample_ids) == 9
