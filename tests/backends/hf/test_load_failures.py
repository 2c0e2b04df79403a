"""What from_pretrained raises is told by its kind: only missing or broken files are said to be missing or broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plop_dist.backends.hf.load import load_model, meta_model
from plop_dist.config.schema import ModelConfig
from plop_dist.errors import ModelError
from tests.models import save_tiny


def set_keys(**keys: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return change


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("break_it", "kind", "remedy"),
    [
        (cut, "SafetensorError", r"its files are complete\.$"),
        (set_keys(hidden_size="wide"), "Strict", r"mend config\.json\.$"),
        (set_keys(hidden_act="bent"), "KeyError", r"does not make this model of its config\.json\.$"),
        (set_keys(attn_implementation="flash_attention_2"), "ImportError", r"install what it names\.$"),
    ],
)
def test_the_remedy_fits_what_is_wrong(
    tmp_path: Path, break_it: Callable[[Path], None], kind: str, remedy: str
) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    break_it(folder)
    with pytest.raises(ModelError, match=rf"cannot be loaded \({kind}\w*: .*\); .*{remedy}") as raised:
        load_model(ModelConfig(name_or_path=str(folder)))
    assert (break_it is cut) == ("files are complete" in str(raised.value))


def test_a_model_that_cannot_be_built_is_not_said_to_lack_files(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    set_keys(hidden_act="bent")(folder)
    with pytest.raises(ModelError, match=r"the architecture cannot be loaded \(KeyError: 'bent'\); its files are"):
        meta_model(ModelConfig(name_or_path=str(folder)))
