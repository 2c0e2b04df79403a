"""`check` knows from the headers alone what loading would find: which weights are missing, and never a false one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from plop_dist.backends.hf.load import meta_model
from plop_dist.backends.hf.stored_weights import check_stored_weights, compare
from plop_dist.checkpoints.safetensors_headers import WEIGHTS_FILE, read_headers
from plop_dist.config.schema import ModelConfig
from plop_dist.errors import ModelError
from tests.cli.cases import assert_one_message, plop_dist, write_case
from tests.models import FAMILIES, save_tiny, tiny

FAST = ("llama", "qwen3_moe")


def as_saved(family: str, folder: Path, **overrides: Any) -> None:
    """Names and parts as transformers writes them: experts one by one, under the hub's names."""
    save_tiny(family, folder, **overrides)


def as_in_memory(family: str, folder: Path, **overrides: Any) -> None:
    """Names and parts as the model holds them: experts in 3-D parameters."""
    save_tiny(family, folder, **overrides)
    weights = {name: value.contiguous() for name, value in tiny(family, **overrides).state_dict().items()}
    if overrides.get("tie_word_embeddings"):
        weights = {name: value.clone() for name, value in weights.items()}
    save_file(weights, folder / WEIGHTS_FILE, {"format": "pt"})


def without_prefix(family: str, folder: Path, **overrides: Any) -> None:
    """Names as the class without a head has them, as in the hub's first checkpoints; its head is then tied."""
    save_tiny(family, folder, **overrides)
    prefix = f"{tiny(family).base_model_prefix}."
    weights = load_file(folder / WEIGHTS_FILE)
    save_file(
        {name.removeprefix(prefix): value for name, value in weights.items()}, folder / WEIGHTS_FILE, {"format": "pt"}
    )


def twin_of(folder: Path) -> tuple[ModelConfig, Any]:
    model = ModelConfig(name_or_path=str(folder))
    return model, meta_model(model)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("write", [as_saved, as_in_memory, without_prefix])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_nothing_is_missing_from_a_whole_folder(
    family: str, write: Callable[..., None], tie: bool, tmp_path: Path
) -> None:
    write(family, tmp_path, tie_word_embeddings=tie)
    assert check_stored_weights(*twin_of(tmp_path)) == ()


@pytest.mark.parametrize(
    "family",
    [name if name in ("llama", "qwen3_moe") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_each_tensor_that_is_lost_is_missed_and_nothing_is_allocated(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    _, twin = twin_of(tmp_path)
    headers = read_headers(tmp_path)
    assert headers is not None
    made: list[torch.nn.Module] = []
    with pytest.MonkeyPatch.context() as patch:
        evaluate = PreTrainedModel.eval  # transformers calls it last of all
        patch.setattr(PreTrainedModel, "eval", lambda self: (made.append(self), evaluate(self))[1])
        assert compare(twin, {}).missing == set(twin.state_dict())
    assert {parameter.device.type for model in made for parameter in model.parameters()} == {"meta"}
    for name in headers:
        found = compare(twin, {other: stored for other, stored in headers.items() if other != name})
        assert len(found.missing) + len(found.misshaped) == 1, name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny("qwen3_moe", tmp_path / "model")


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    weights = load_file(folder / WEIGHTS_FILE)
    change(weights)
    save_file(weights, folder / WEIGHTS_FILE, {"format": "pt"})


def test_the_tensor_of_one_expert_is_named(folder: Path) -> None:
    edit(folder, lambda weights: weights.pop("model.layers.1.mlp.experts.2.gate_proj.weight"))
    message = r"its files lack 1 tensor, 'model\.layers\.1\.mlp\.experts\.2\.gate_proj\.weight'"
    with pytest.raises(ModelError, match=f"(?i){message}"):
        check_stored_weights(*twin_of(folder))


def test_shapes_that_are_not_the_configurations(folder: Path) -> None:
    def widen(weights: dict[str, Any]) -> None:
        weights["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(64, 64)

    edit(folder, widen)
    message = r"1 weight of another shape .*'model\.layers\.1\.self_attn\.k_proj\.weight' \[64, 64\] instead of \[32, "
    with pytest.raises(ModelError, match=message):
        check_stored_weights(*twin_of(folder))


def test_what_the_model_has_no_place_for_is_a_note(folder: Path) -> None:
    edit(folder, lambda weights: weights.update({f"extra.{n}": torch.zeros(1) for n in range(5)}))
    (note,) = check_stored_weights(*twin_of(folder))
    assert note == "The model has no place for 5 tensors, e.g. 'extra.0', 'extra.1', 'extra.2' of the files."


def test_what_cannot_be_looked_at_is_said(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (note,) = check_stored_weights(*twin_of(folder))
    assert note.startswith("No weights beside config.json")
    torch.save({}, folder / "pytorch_model.bin")
    (note,) = check_stored_weights(*twin_of(folder))
    assert "pytorch_model.bin cannot be looked at without loading it" in note


def test_check_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    config = write_case(tmp_path, folder)
    assert plop_dist("check", config).status == 0
    edit(folder, lambda weights: [weights.pop(name) for name in list(weights) if ".layers.1." in name])
    outcome = plop_dist("check", config)
    assert_one_message(outcome, str(folder), "has no weights for 11 parameters, e.g. 'model.layers.1.input_layernorm")
    (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:-100])
    assert_one_message(plop_dist("check", config), str(folder / WEIGHTS_FILE), "is cut off")
