"""Vision-language models on rows with images: scores by the definition, SFT, and the adapter in the own class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from plop_dist.backends.hf.load import load_processor
from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config
from plop_dist.costs.plan import build_plan
from plop_dist.data.processed import ImageRows
from plop_dist.errors import DataError, LayoutError, ModelError
from plop_dist.launch import pipeline
from plop_dist.values.scores import Scores
from tests.data.test_images import save_image
from tests.installed import needs_torchvision
from tests.vlms import VLMS, save_tiny_processor, save_tiny_vlm, tiny_vlm

pytestmark = pytest.mark.slow
SIZES = ((40, 30), (30, 56), (64, 64), (28, 28), (50, 20), (33, 44))
WITHOUT_TORCHVISION = ("llava", "gemma3")
FAMILIES = [name if name in WITHOUT_TORCHVISION else pytest.param(name, marks=needs_torchvision) for name in VLMS]


def rows_in(folder: Path) -> list[dict[str, Any]]:
    """Write rows of one or two images each, and return them."""
    rows = []
    for index, (width, height) in enumerate(SIZES):
        save_image(folder / f"{index}.png", width, height, seed=index)
        rows.append({
            "messages": [{"role": "user", "content": "what is it"[: 4 + index]},
                         {"role": "assistant", "content": "a cat"}],
            "image": [f"{index}.png"] * (1 + index % 2),
        })  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def config_in(folder: Path, family: str, **sections: Any) -> Config:
    save_tiny_vlm(family, folder / "model")
    save_tiny_processor(family, folder / "model")
    return parse_config(
        {
            "run_dir": str(folder / "run"),
            "model": {"name_or_path": str(folder / "model"), "dtype": "float32"},
            "data": {"path": str(folder / "rows.jsonl"), "messages_field": "messages", "images_field": "image",
                     "max_length": 400},
            "estimator": {"baseline": "exact"},
            "placement": {"rank": 2},
            **sections,
        }
    )  # fmt: skip


def truth_of(model: nn.Module, inputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return every linear's gains in float64 over all vectors that it is given, one row at a time."""
    model, gains = model.double(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def note(module: nn.Linear, args: tuple[Tensor, ...], _: Any, name: str = name) -> None:
                z_TI = args[0].detach().reshape(-1, args[0].shape[-1])
                gains.setdefault(name, []).append((z_TI @ module.weight.T).norm(dim=1) / z_TI.norm(dim=1))

            module.register_forward_hook(note)
    with torch.no_grad():
        for one in inputs:
            model(**{name: value.double() if value.is_floating_point() else value for name, value in one.items()})
    return {name: torch.cat(found) for name, found in gains.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_is_scored_on_what_it_sees(tmp_path: Path, family: str) -> None:
    rows, config = rows_in(tmp_path), config_in(tmp_path, family)
    plan = build_plan(config)
    assert plan.verdict.is_ok, plan.verdict.problems
    pipeline.score(config, "test")
    scores = Scores.from_file(tmp_path / "run" / "scores.json")
    read = ImageRows(rows, config.data, load_processor(config.model), 400)
    truth = truth_of(tiny_vlm(family), [read.read([index]) for index in range(len(rows))])
    assert {module.fqn for module in scores.modules} == truth.keys() - {"lm_head"}
    for module in scores.modules:
        gains = truth[module.fqn][truth[module.fqn].isfinite()]  # a pooled place without a patch is a vector of zeros
        assert module.num_tokens == len(gains), module.fqn
        assert module.gain == pytest.approx(float(gains.mean()), rel=1e-5), module.fqn
    assert plan.data.num_tokens == scores.data.num_tokens
    assert {module.part for module in scores.modules} >= {"language", "vision"}


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_on_images_trains_the_placement_and_the_own_class_reads_it(tmp_path: Path, family: str) -> None:
    rows = rows_in(tmp_path)
    train = {"method": "sft", "max_steps": 3, "learning_rate": 1e-2, "micro_batch_size": 2, "eval_samples": 2}
    config = config_in(tmp_path, family, train={**train, "max_length": 400})
    pipeline.run(config, "test")
    summary = json.loads((tmp_path / "run" / "train" / "summary.json").read_text())
    placement = json.loads((tmp_path / "run" / "placement.json").read_text())
    model: Any = PeftModel.from_pretrained(tiny_vlm(family), summary["adapter"]).eval()
    names = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert {name.removeprefix("base_model.model.") for name in names} == set(placement["modules"])
    processor = load_processor(config.model)
    read = ImageRows(rows, config.data, processor, 400)
    # The mean over the held-out rows' tokens, by transformers' own loss, one row at a time.
    total, count = 0.0, 0
    with model.disable_adapter(), torch.no_grad():
        for index in (4, 5):
            inputs = read.read([index], end=processor.tokenizer.eos_token)
            labels = inputs["input_ids"].masked_fill(read.is_placeholder(inputs["input_ids"]), -100)
            num = int((labels[:, 1:] != -100).sum())
            total, count = total + float(model(**inputs, labels=labels).loss) * num, count + num
    assert summary["held_out_before"] == pytest.approx(total / count, rel=1e-4)
    assert summary["held_out_after"] != summary["held_out_before"]


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"backend": "deepspeed", "tp": 2}, r"rows have images, which parallel\.backend 'deepspeed' does not score"),
        ({"backend": "deepspeed", "pp": 2}, "plain stack|LlavaForConditionalGeneration"),
        (
            {"backend": "megatron", "tp": 2},
            "is a LlavaForConditionalGeneration: Megatron.s layers without Transformer Engine",
        ),
    ],
)
def test_layouts_that_may_not_see_a_tower_whole_are_refused(
    tmp_path: Path, parallel: dict[str, Any], message: str
) -> None:
    rows_in(tmp_path)
    config = config_in(tmp_path, "llava", parallel=parallel)
    with pytest.raises((LayoutError, ModelError), match=message):
        build_plan(config)


@pytest.mark.parametrize("name", ["image_token_index", "audio_token_id"])
def test_a_place_for_an_image_in_rows_of_text_is_refused_by_check_and_by_score(tmp_path: Path, name: str) -> None:
    save_tiny_vlm("llava", tmp_path / "model")
    save_tiny_processor("llava", tmp_path / "model")
    if name != "image_token_index":
        path = tmp_path / "model" / "config.json"
        kept = json.loads(path.read_text())
        path.write_text(json.dumps({**kept, "image_token_index": 131, name: kept["image_token_index"]}))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "<image>what is it"}) + "\n")
    config = parse_config({
        "run_dir": str(tmp_path / "run"),
        "model": {"name_or_path": str(tmp_path / "model"), "dtype": "float32"},
        "data": {"path": str(tmp_path / "rows.jsonl")},
    })  # fmt: skip
    sense, remedy = name.partition("_")[0], "by data.images_field" if name.startswith("image") else "in your own job"
    for step in (lambda: build_plan(config), lambda: pipeline.score(config, "test")):
        with pytest.raises(DataError, match=rf"token 128, which is a place for {sense} input in .*{remedy}"):
            step()


def test_images_are_refused_where_they_would_be_dropped(tmp_path: Path) -> None:
    rows_in(tmp_path)
    for section, message in (
        ({"method": "grpo"}, "the rows have images, which train.method=grpo does not read"),
        ({"method": "sft", "packing": True}, "train.packing is True, but the rows have images"),
        ({"method": "sft", "track_nfn_every": 1}, "train.track_nfn_every is 1, but the rows have images"),
    ):
        config = config_in(tmp_path, "llava", train={**section, "eval_samples": 2})
        assert any(message in problem for problem in build_plan(config).verdict.problems)
