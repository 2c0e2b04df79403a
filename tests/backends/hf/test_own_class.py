"""A checkpoint is scored as the class that it names, and only its language model is placed, whatever else it holds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import plop_dist
from plop_dist.backends.hf.load import load_model, meta_model
from plop_dist.choose.place import place
from plop_dist.config.loading import parse_config
from plop_dist.config.schema import ModelConfig
from plop_dist.errors import ExportError, ModelError
from plop_dist.exporters.exporter import find_exporter
from plop_dist.exporters.read_back import read_export
from plop_dist.exporters.write import write_export
from plop_dist.launch import pipeline
from plop_dist.registry import EXPORTERS
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Scores
from tests.models import random_tokens, save_tiny, tiny_tokenizer
from tests.reference import brute_force
from tests.vlms import VLMS, save_tiny_vlm, tiny_vlm, tiny_vlm_config

TEXTS = ("the rain in spain", "hello there", "a longer text about nothing at all")
SLOW = pytest.mark.slow


@pytest.fixture(scope="module", params=[pytest.param(name, marks=SLOW) for name in VLMS])
def scored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family and the directory of its model, data and scores."""
    root = tmp_path_factory.mktemp(request.param)
    save_tiny_vlm(request.param, root / "model")
    (root / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = {
        "run_dir": str(root / "run"),
        "model": {"name_or_path": str(root / "model"), "dtype": "float32"},
        "data": {"path": str(root / "data.jsonl"), "batch_size": 2},
        "estimator": {"baseline": "exact"},
    }
    pipeline.score(parse_config(config), "test")
    return request.param, root


def adapted_by(model: Any, placement: Placement) -> set[str]:
    """Return what PEFT adapts in a model when it is handed the placement's configuration."""
    adapted: Any = get_peft_model(model, placement.to_peft())
    names = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")]
    return {name.removeprefix("base_model.model.") for name in names}


def test_the_language_model_of_a_checkpoint_s_own_class_is_scored_exactly(scored: tuple[str, Path]) -> None:
    family, root = scored
    scores = Scores.from_file(root / "run" / "scores.json")
    assert scores.model.architecture == VLMS[family][0]
    truth = brute_force(tiny_vlm(family), [tiny_tokenizer()(text)["input_ids"] for text in TEXTS])
    for module in scores.modules:
        gain = torch.cat([one.gains for one in truth[module.fqn]]).mean()
        assert module.gain == pytest.approx(float(gain), rel=1e-5), module.fqn
        assert module.part == "language"
        assert module.fqn.startswith(("model.language_model.", "model.text_model."))
    assert {module.fqn for module in scores.modules} == truth.keys() - {"lm_head"}
    parts = Counter(entry.part for entry in scores.left_out)
    assert parts["vision"]
    assert {entry.reason for entry in scores.left_out} == {"no_tokens"}


@pytest.mark.parametrize("options", [{"k": 3}, {"granularity": "module", "k": 5}, {"policy": "all"}])
def test_peft_adapts_exactly_the_placement_in_the_own_class(scored: tuple[str, Path], options: dict[str, Any]) -> None:
    family, root = scored
    placement = place(Scores.from_file(root / "run" / "scores.json"), rank=2, **options)
    assert adapted_by(tiny_vlm(family), placement) == set(placement.modules)


def test_every_target_adapts_exactly_the_placement_or_refuses(scored: tuple[str, Path]) -> None:
    _, root = scored
    scores = Scores.from_file(root / "run" / "scores.json")
    written, refusals = set(), set[str]()
    for target in EXPORTERS.own:
        for engine in find_exporter(target).engines:
            placement = place(scores, rank=2, k=3)
            try:
                export = write_export(placement, target, root / "exports", engine=engine, widen=False)
            except ExportError as refused:
                refusals.add(str(refused))
                continue
            for name in export.files:
                found = read_export(root / "exports" / target / name, placement, target)
                assert found.ranks.keys() == set(placement.modules), (target, engine)
                written.add(target)
    assert all("a part besides its language model" in text for text in refusals)
    assert {"peft", "trl", "verl", "deepspeed", "llamafactory"} <= written


def pixels(num: int) -> dict[str, Tensor]:
    """Return inputs with an image each for a LLaVA of 28 x 28 images in four patches, the last row padded."""
    ids = random_tokens(num, 9)
    ids[:, 1:5] = tiny_vlm_config("llava").image_token_index
    mask = torch.ones_like(ids)
    ids[-1, 7:], mask[-1, 7:] = 0, 0
    generator = torch.Generator().manual_seed(3)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(num, 3, 28, 28, generator=generator)}


def see_towers(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, float]:
    """Return the mean gain of every linear over all that it is given, by torch's own products in float64."""
    model, gains, handles = model.double(), {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def note(module: nn.Linear, args: tuple[Tensor, ...], _: Any, name: str = name) -> None:
                z_TI = args[0].detach().reshape(-1, args[0].shape[-1])
                gains.setdefault(name, []).append((z_TI @ module.weight.T).norm(dim=1) / z_TI.norm(dim=1))

            handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        model(**{**batch, "pixel_values": batch["pixel_values"].double()})
    for handle in handles:
        handle.remove()
    return {name: float(torch.cat(found).mean()) for name, found in gains.items()}


@pytest.mark.parametrize("num_rows", [1, 2])
def test_towers_count_all_that_they_see_and_types_of_theirs_are_their_own(num_rows: int) -> None:
    batch = pixels(num_rows)
    # The tower sees five vectors of an image: two rows of five tokens have its shape, one of them with padding.
    batch = {**batch, "input_ids": batch["input_ids"][:, :5], "attention_mask": batch["attention_mask"][:, :5].clone()}
    batch["attention_mask"][0, 0] = 0
    scores = plop_dist.score(tiny_vlm("llava"), [batch], baseline="exact")
    truth = see_towers(tiny_vlm("llava"), batch)
    towers = [module for module in scores.modules if module.part != "language"]
    assert {module.part for module in towers} == {"vision", "projector"}
    for module in towers:
        assert module.gain == pytest.approx(truth[module.fqn], rel=1e-5), module.fqn
        assert module.num_tokens == num_rows * (5 if module.part == "vision" else 4)
        assert module.type.startswith(f"{module.part}.")
    assert scores.data.num_tokens == batch["attention_mask"].sum()
    assert {entry.type for entry in scores.types} >= {"q_proj", "vision.q_proj", "projector.linear_1"}


@pytest.mark.parametrize(
    ("include", "chosen"),
    [
        ([], "language"),
        (["q_proj", "*.k_proj", "*"], "language"),
        (["vision.q_proj"], "vision"),
        (["vision_tower.*", "fc1"], "vision"),
        (["projector.linear_1"], "projector"),
    ],
)
def test_only_an_entry_of_their_own_chooses_towers(include: list[str], chosen: str) -> None:
    model = tiny_vlm("llava")
    placement = place(plop_dist.score(model, [pixels(2)]), policy="all", rank=2, include=include)
    assert {module.part for module in placement.chosen} == {chosen}
    assert adapted_by(model, placement) == set(placement.modules)


@SLOW
def test_an_adapter_is_loaded_into_the_own_class_and_changes_it(tmp_path: Path) -> None:
    model: Any = tiny_vlm("qwen3_vl")
    placement = place(plop_dist.score(model, [{"input_ids": random_tokens(2, 7)}]), rank=2)
    adapted: Any = get_peft_model(model, placement.to_peft())
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_vlm("qwen3_vl"), str(tmp_path))
    ids = random_tokens(1, 7)
    plain = tiny_vlm("qwen3_vl")(input_ids=ids).logits
    assert torch.equal(again(input_ids=ids).logits, adapted(input_ids=ids).logits)
    assert not torch.allclose(again(input_ids=ids).logits, plain)


def edited(folder: Path, **fields: Any) -> ModelConfig:
    """Return the model of a folder whose config.json has other values, None for none."""
    config = json.loads((folder / "config.json").read_text())
    config.update(fields)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return ModelConfig(name_or_path=str(folder))


def test_an_auto_class_loads_what_it_stands_for(tmp_path: Path) -> None:
    folder = save_tiny_vlm("qwen3_5", tmp_path)
    model = ModelConfig(name_or_path=str(folder), auto_class="AutoModelForCausalLM")
    assert type(load_model(model)).__name__ == type(meta_model(model)).__name__ == "Qwen3_5ForCausalLM"
    own = ModelConfig(name_or_path=str(folder))
    assert type(load_model(own)).__name__ == type(meta_model(own)).__name__ == "Qwen3_5ForConditionalGeneration"


@pytest.mark.parametrize("architectures", [None, ["NobodysForCausalLM"]])
def test_without_a_known_class_the_default_is_taken_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, architectures: list[str] | None
) -> None:
    model = edited(save_tiny("llama", tmp_path), architectures=architectures)
    assert type(load_model(model)).__name__ == "LlamaForCausalLM"
    (said,) = [record.message for record in caplog.records if "model.auto_class" in record.message]
    assert "AutoModelForCausalLM" in said


def test_a_class_without_a_head_and_one_that_reads_no_text_are_refused(tmp_path: Path) -> None:
    headless = edited(save_tiny("llama", tmp_path / "llama"), architectures=["LlamaModel"])
    with pytest.raises(ModelError, match=r"LlamaModel, a class without a head.*model\.auto_class=AutoModelForCausalLM"):
        load_model(headless)
    with_head = headless.model_copy(update={"auto_class": "AutoModelForCausalLM"})
    assert type(load_model(with_head)).__name__ == "LlamaForCausalLM"
    whisper = transformers.WhisperConfig(d_model=16, encoder_layers=1, decoder_layers=1)
    whisper.architectures = ["WhisperForConditionalGeneration"]
    whisper.save_pretrained(tmp_path / "whisper")
    with pytest.raises(ModelError, match=r"WhisperForConditionalGeneration, whose main input is input_features"):
        meta_model(ModelConfig(name_or_path=str(tmp_path / "whisper")))


@pytest.mark.parametrize(
    ("auto_class", "message"),
    [
        ("AutoModelForCausalML", r"model\.auto_class 'AutoModelForCausalML' is no Auto class.*Did you mean"),
        ("LlamaForCausalLM", "'LlamaForCausalLM' is no Auto class of transformers"),
        ("AutoModelForImageTextToText", r"has no class for model type 'llama'.*leave it out.*LlamaForCausalLM"),
    ],
)
def test_an_auto_class_that_does_not_fit_is_refused(tmp_path: Path, auto_class: str, message: str) -> None:
    folder = save_tiny("llama", tmp_path)
    with pytest.raises(ModelError, match=message):
        load_model(ModelConfig(name_or_path=str(folder), auto_class=auto_class))
