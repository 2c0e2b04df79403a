"""Rows with images: where they are looked for, where the text has a place for them, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Llama4ImageProcessor, Llama4Processor

from plop_dist.backends.hf.load import load_processor
from plop_dist.config.schema import DataConfig, ModelConfig
from plop_dist.data.images import has_images, images_of, refuse_images, with_placeholders
from plop_dist.data.processed import ImageRows, ImageSamples
from plop_dist.data.samples import tokenize
from plop_dist.data.texts import render
from plop_dist.errors import DataError, ModelError
from tests.installed import needs_torchvision
from tests.models import save_tiny, tiny_tokenizer
from tests.vlms import save_tiny_processor, save_tiny_vlm

USER = {"role": "user", "content": "what is it"}
ANSWER = {"role": "assistant", "content": "a cat"}


def save_image(path: Path, width: int = 30, height: int = 20, seed: int = 0) -> bytes:
    """Save an image of noise, and return the bytes of the file."""
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "png")
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = save_tiny_vlm("llava", tmp_path_factory.mktemp("llava"))
    save_tiny_processor("llava", folder)
    return ModelConfig(name_or_path=str(folder))


def data_in(folder: Path, **fields: Any) -> DataConfig:
    return DataConfig(path=str(folder / "rows.jsonl"), **fields)


def test_an_image_is_a_path_beside_the_rows_bytes_or_itself(tmp_path: Path) -> None:
    content = save_image(tmp_path / "a.png")
    data = data_in(tmp_path, images_field="image")
    for value in ("a.png", str(tmp_path / "a.png"), {"bytes": content, "path": None}, {"bytes": None, "path": "a.png"},
                  content, Image.open(tmp_path / "a.png")):  # fmt: skip
        (found,) = images_of({"image": value}, 1, data)
        assert (found.mode, found.size) == ("RGB", (30, 20))
    assert len(images_of({"image": ["a.png", "a.png"]}, 1, data)) == 2
    assert images_of({"image": None}, 1, data) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("b.png", r"row 3: the image 'b\.png' does not exist; paths are looked for in the folder of"),
        ("rows.txt", "row 3: the image cannot be read: cannot identify image file"),
        ("https://example.org/a.png", "nothing is fetched; put it into a file beside the rows"),
        (7, "row 3: the image is a number, expected a path or an image"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, value: Any, message: str) -> None:
    (tmp_path / "rows.txt").write_text("no image")
    with pytest.raises(DataError, match=message):
        images_of({"image": value}, 3, data_in(tmp_path, images_field="image"))
    with pytest.raises(DataError, match=r"row 3 has no column 'image' \(data.images_field\); it has text"):
        images_of({"text": "x"}, 3, data_in(tmp_path, images_field="image"))


def test_content_parts_say_where_images_are_and_which(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "b.png", width=10)
    parts = [{"type": "image", "path": "b.png"}, {"type": "text", "text": "and"}, {"type": "image"}]
    row = {"messages": [{"role": "user", "content": parts}, ANSWER], "image": "a.png"}
    data = data_in(tmp_path, messages_field="messages", images_field="image")
    assert [image.size[0] for image in images_of(row, 1, data)] == [10, 30]
    with pytest.raises(DataError, match=r"has 1 images without a path, and data\.images_field gives 2"):
        images_of({**row, "image": ["a.png", "a.png"]}, 1, data)
    open_ended = data_in(tmp_path, messages_field="messages")
    with pytest.raises(DataError, match=r"has 1 images without a path, and data\.images_field gives 0"):
        images_of(row, 1, open_ended)
    linked = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}]}
    assert has_images([linked], open_ended)
    assert [image.size[0] for image in images_of(linked, 1, open_ended)] == [30]


@pytest.mark.parametrize("kind", ["video", "video_url", "audio", "input_audio"])
def test_parts_that_are_not_read_are_refused_whatever_the_template_makes_of_them(kind: str) -> None:
    data = DataConfig(path="rows.jsonl", messages_field="messages")
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": kind}]}, ANSWER]}
    with pytest.raises(DataError, match=rf"row 1: column 'messages' has a content part of type '{kind}', and only"):
        render(row, 1, data, tiny_tokenizer())
    thinking = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "see"},
    ]  # Magistral's template reads it
    assert render({"messages": [{**USER, "content": thinking}, ANSWER]}, 1, data, tiny_tokenizer())


def test_images_without_a_part_come_first_in_the_first_message_of_the_user() -> None:
    found = with_placeholders([{"role": "system", "content": "be kind"}, USER, ANSWER, USER], 2)
    kinds = [[part["type"] for part in message["content"]] for message in found]
    assert kinds == [["text"], ["image", "image", "text"], ["text"], ["text"]]


def test_parts_of_text_alone_are_read_as_their_text_by_a_chat_template() -> None:
    data = DataConfig(path="rows.jsonl", messages_field="messages")
    parts = [{"type": "text", "text": "what "}, {"type": "text", "text": "is it"}]
    rows = [{"messages": [{"role": "user", "content": content}, ANSWER]} for content in (parts, "what is it")]
    texts = {render(row, 1, data, tiny_tokenizer()) for row in rows}
    assert texts == {"user: what is it\nassistant: a cat\n"}
    assert not has_images(rows, data)


def test_a_text_with_places_for_its_images_and_a_chat_are_read_alike(tmp_path: Path, model: ModelConfig) -> None:
    save_image(tmp_path / "a.png")
    processor = load_processor(model)
    chat = {"messages": [USER, ANSWER], "image": "a.png"}
    plain = {"text": "user: <image>what is it\nassistant: a cat\n", "image": "a.png"}
    found = [
        ImageRows([row], data_in(tmp_path, images_field="image", **fields), processor, 64).read([0])
        for row, fields in ((chat, {"messages_field": "messages"}), (plain, {}))
    ]
    assert found[0].keys() == found[1].keys() >= {"input_ids", "attention_mask", "pixel_values"}
    assert all(bool((found[0][name] == found[1][name]).all()) for name in found[0])
    assert (found[0]["input_ids"] == 128).sum() == 4


def test_what_would_cut_or_lose_an_image_is_refused(tmp_path: Path, model: ModelConfig) -> None:
    save_image(tmp_path / "a.png")
    processor, data = load_processor(model), data_in(tmp_path, images_field="image")
    rows = [{"text": text, "image": "a.png"} for text in ("no place", "here: <image> it is", "<image> and <image>")]
    read = ImageRows(rows, data, processor, 7)
    with pytest.raises(DataError, match=r"row 1 has images, but the text has no place.*'<image>'.*data.messages_field"):
        read.read([0])
    with pytest.raises(DataError, match=r"row 2: images reach to token \d+, beyond the 7 of max_length.*no image is"):
        read.read([1])
    with pytest.raises(DataError, match="row 3: the processor cannot read text and 1 images"):
        ImageRows(rows, data, processor, 64).read([2])
    mixed = ImageRows([{"text": "<image>", "image": "a.png"}, {"text": "x", "image": None}], data, processor, 64)
    with pytest.raises(DataError, match="row 1, 2: only some of these rows have images"):
        mixed.read([0, 1])
    cut = ImageRows(rows, data, processor, 10).read([1])
    assert cut["input_ids"].shape == cut["attention_mask"].shape == (1, 10)


@needs_torchvision
def test_features_of_16_bits_are_given_in_the_models_dtype(tmp_path: Path) -> None:
    tokenizer: Any = tiny_tokenizer()
    marks = [
        "<|patch|>",
        "<|image_start|>",
        "<|image_end|>",
        "<|image|>",
        "<|tile_x_separator|>",
        "<|tile_y_separator|>",
    ]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    images = Llama4ImageProcessor(size={"height": 28, "width": 28}, max_patches=1)
    processor = Llama4Processor(images, tokenizer, patch_size=7, pixel_shuffle_ratio=0.5)
    save_image(tmp_path / "a.png")
    rows, data = [{"text": "<|image|> it is", "image": "a.png"}], data_in(tmp_path, images_field="image")
    found = {
        dtype: ImageRows(rows, data, processor, 64, dtype=dtype).read([0])["pixel_values"]
        for dtype in (None, torch.bfloat16, torch.float32)
    }
    assert found[None].dtype == torch.bfloat16
    assert {dtype: one.dtype for dtype, one in found.items() if dtype} == {one: one for one in found if one}
    assert torch.equal(found[torch.float32], found[None].float())


def test_samples_know_their_images_apart(tmp_path: Path, model: ModelConfig) -> None:
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "b.png", seed=1)
    processor, data = load_processor(model), data_in(tmp_path, images_field="image")
    samples = [ImageSamples(ImageRows([{"text": "<image> x", "image": name}], data, processor, 64))
               for name in ("a.png", "b.png")]  # fmt: skip
    assert samples[0][0] == samples[1][0]
    assert samples[0].digest != samples[1].digest
    filler = samples[0].micro_batch([])
    assert filler.has_features
    assert bool((filler.sample_ids == -1).all())
    assert bool((samples[0].micro_batch([0]).sample_ids == 0).all())


def test_where_texts_alone_are_read_images_are_refused(tmp_path: Path) -> None:
    data = data_in(tmp_path, images_field="image")
    with pytest.raises(DataError, match=r"rows have images, which are read by scoring and by train.method=sft"):
        tokenize([{"text": "x", "image": "a.png"}], data, tiny_tokenizer())
    refuse_images([{"text": "x"}], data_in(tmp_path))


def test_a_model_without_a_processor_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    with pytest.raises(ModelError, match=r"has no processor for images and texts.*leave data.images_field out"):
        load_processor(ModelConfig(name_or_path=str(folder)))
