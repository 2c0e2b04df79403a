"""Whether a model sees padding is found out, not known: families of either kind, and lengths at which one begins to."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import plop_dist
from plop_dist.backends.hf import padding
from plop_dist.backends.hf.model import HFModel
from plop_dist.backends.hf.packed_training import check_packing
from plop_dist.errors import ConfigError, DataError, ModelError
from tests.models import random_tokens, tiny
from tests.sweep.family import build
from tests.sweep.table import architectures

# Doge's tokens see padding up to some release of transformers, and not in 5.24.
DOGE_SEES = tuple(map(int, version("transformers").split(".")[:2])) < (5, 24)


def padded(*lengths: int) -> dict[str, Tensor]:
    ids = random_tokens(len(lengths), max(lengths), seed=1) % 90 + 5
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return {"input_ids": ids.where(mask == 1, 0), "attention_mask": mask}


def gains(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    return {module.fqn: module.gain for module in plop_dist.score(model, batches, baseline="closed_form").modules}


def alone(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [{"input_ids": row[mask == 1][None], "attention_mask": mask[mask == 1][None]} for row, mask in rows]


@pytest.mark.parametrize(
    "family",
    ["llama", "gpt2", "mamba", "roberta", "jamba", "deepseek_v32", "phi3", *([] if DOGE_SEES else ["doge"])],
)
def test_padding_is_taken_where_no_token_sees_it(family: str) -> None:
    model, batch = build(family, architectures()[family]), padded(24, 9)
    assert gains(model, [batch]) == pytest.approx(gains(model, alone(batch)), rel=1e-5)


@pytest.mark.parametrize("family", [*(["doge"] if DOGE_SEES else []), "prophetnet", "fnet", "mobilebert", "yoso"])
def test_padding_is_refused_where_tokens_see_it(family: str) -> None:
    model, batch = build(family, architectures()[family]), padded(24, 9)
    said = rf"other activations for {family} \(their gains differ by \d+ times.*\); .* \(data\.batch_size=1\)"
    with pytest.raises(DataError, match=said):
        plop_dist.score(model, [batch])
    assert plop_dist.score(model, alone(batch)).modules


class SeesFarPadding(PreTrainedModel):
    """Llama, which looks at the embedding behind its row from twenty tokens on, as sparse attention may."""

    @classmethod
    def around(cls, model: Any) -> Any:
        inner = type(model)

        class Far(inner):  # type: ignore[misc, valid-type]
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                self.model.register_forward_pre_hook(self._look, with_kwargs=True)

            def _look(self, _module: Any, args: Any, kwargs: Any) -> Any:
                ids = kwargs["input_ids"]
                embedded = self.model.embed_tokens(ids)
                if ids.shape[1] > 20:
                    embedded = embedded + 0.01 * embedded.flip(1)
                return args, {**kwargs, "input_ids": None, "inputs_embeds": embedded}

        return Far


def test_the_length_counts() -> None:
    base: Any = tiny("llama")
    model = SeesFarPadding.around(base)(base.config).eval()
    model.load_state_dict(base.state_dict())
    short, long = padded(16, 9), padded(40, 9)
    assert gains(model, [short]) == pytest.approx(gains(model, alone(short)), rel=1e-5)
    with pytest.raises(DataError, match="other activations for llama"):
        plop_dist.score(model, [short, long])


def test_the_copy_is_small_said_in_the_log_and_leaves_the_host_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []
    build_copy = padding._build
    monkeypatch.setattr(padding, "_build", lambda *args: built.append(build_copy(*args)) or built[-1])
    model = tiny("llama", num_hidden_layers=9)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with caplog.at_level(logging.DEBUG, "plop_dist"):
        plop_dist.score(model, [padded(16, 9), padded(12, 15)])
    assert torch.equal(torch.rand(3), expected)
    (small,) = built
    assert len(small.model.layers) == small.config.num_hidden_layers == 2
    assert model.config.num_hidden_layers == 9
    assert small.model.layers[0].mlp.up_proj.weight.shape == model.model.layers[0].mlp.up_proj.weight.shape
    assert "LlamaForCausalLM at 16 tokens: padding is not seen" in caplog.text


def test_rows_of_one_length_ask_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding, "_build", lambda *_: pytest.fail("nothing is padded"))
    assert plop_dist.score(tiny("doge", hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                num_attention_heads=4, num_key_value_heads=2), [padded(9, 9)]).modules  # fmt: skip


def test_what_cannot_be_found_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("layer_kinds")

    monkeypatch.setattr(padding, "_build", fail)
    with pytest.raises(DataError, match=r"cannot be found out \(KeyError: 'layer_kinds'\); pass one sample"):
        plop_dist.score(tiny("llama"), [padded(16, 9)])


def test_a_class_that_is_not_transformers_is_refused_beside_padding() -> None:
    class Host(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(200, 8), torch.nn.Linear(8, 8)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(self.embedding(input_ids))

    with pytest.raises(DataError, match=r"cannot be found out \(TypeError: Host is no model .*; pass one sample"):
        plop_dist.score(Host(), [padded(16, 9)])
    assert plop_dist.score(Host(), [padded(9, 9)]).modules


@pytest.mark.parametrize("length", [3, 4])
def test_modules_that_see_the_axes_of_a_batch_swapped_are_refused_in_a_square_one_too(length: int) -> None:
    """XLNet's read (tokens, rows), which has the shape of the batch where there are as many rows as tokens."""
    ids = random_tokens(3, length)
    with pytest.raises(ModelError, match="XLNetLMHeadModel shows its modules other activations than one per token"):
        plop_dist.score(build("xlnet", "XLNetLMHeadModel"), [{"input_ids": ids}], num_directions=4)


def test_a_square_batch_is_scored_as_its_rows_alone() -> None:
    model: Any = tiny("llama")
    ids = random_tokens(4, 4)
    square = plop_dist.score(model, [{"input_ids": ids}], num_directions=4)
    alone = plop_dist.score(model, [{"input_ids": row[None]} for row in ids], num_directions=4)
    assert square.data.num_tokens == 16
    assert [(one.fqn, one.num_tokens, pytest.approx(one.gain, rel=1e-5)) for one in alone.modules] == [
        (one.fqn, one.num_tokens, one.gain) for one in square.modules
    ]


def packed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = [row["input_ids"][0] for row in alone(batch)]
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_packed_rows_are_taken_where_their_samples_are_kept_apart(family: str) -> None:
    model, batch = build(family, architectures()[family]), padded(24, 9)
    assert gains(model, [packed(batch)]) == pytest.approx(gains(model, alone(batch)), rel=1e-5)


@pytest.mark.parametrize("family", ["albert", "openai-gpt", "qwen3_next"])
def test_packed_rows_are_refused_where_their_samples_see_each_other(family: str) -> None:
    model, batch = build(family, architectures()[family]), padded(24, 9)
    said = rf"another sample in a row, beside which .* for {family} \(their gains differ by \d+ times.*\); pass one"
    with pytest.raises(DataError, match=said):
        plop_dist.score(model, [packed(batch)])


def test_training_packs_samples_where_they_are_kept_apart_alone() -> None:
    for family in ("llama", "gpt2"):
        check_packing(on_meta(family), 24)
    for family in ("openai-gpt", "qwen3_next"):
        with pytest.raises(ConfigError, match=rf"packing is true, but for {family} .*; set train.packing=false"):
            check_packing(on_meta(family), 24)


def on_meta(family: str) -> Any:
    model = build(family, architectures()[family])
    with torch.device("meta"):
        return type(model)(model.config)


@pytest.mark.parametrize("sees", [padding.sees_padding, padding.sees_neighbours])
def test_a_host_with_flash_attention_is_asked_in_float32(sees: Any) -> None:
    model = build("llama", architectures()["llama"])
    model.config._attn_implementation_internal = "flash_attention_2"
    found = sees(model, random_tokens(1, 24)[0], 24, torch.device("cpu"), HFModel(model, []).alike)
    assert found <= 1


def test_the_copy_has_no_weight_that_nothing_was_written_to() -> None:
    """Biases of OpenAI GPT, which transformers 5.12 does not make: what they held decided whether padding is seen."""
    model = build("openai-gpt", architectures()["openai-gpt"])
    memory: Any = torch.utils.deterministic
    is_filled = memory.fill_uninitialized_memory
    copies = [padding._build(model, model.config, torch.device("cpu")) for _ in range(2)]
    assert not torch.are_deterministic_algorithms_enabled()
    assert memory.fill_uninitialized_memory == is_filled
    for (name, one), other in zip(copies[0].named_parameters(), copies[1].parameters(), strict=True):
        assert torch.equal(one, other), name
        assert one.abs().max() < 10, name


def test_the_copys_overlapping_weights_are_asked_without_a_copy_of_them() -> None:
    size = 1 << 21
    for value, is_unwritten in ((0.0, False), (torch.nan, True)):
        line = torch.full((2 * size,), value)
        assert padding._is_unwritten(line.as_strided((size, size), (1, 1))) == is_unwritten  # 16 TiB
