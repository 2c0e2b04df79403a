"""What is quantised in a way that cannot be loaded or read here is refused by check and by score, in the same words."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from plop_dist.config.loading import load_config
from tests.backends.hf.quantized.kinds import BNB, SIZES, load, torchao
from tests.cli.cases import assert_one_message, modules_of, plop_dist, write_case
from tests.models import save_tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "model", **SIZES)


def as_override(quantization: dict[str, Any]) -> str:
    return f"model.quantization={json.dumps(quantization)}"


def claim(model: Path, **quantization: Any) -> None:
    """Have a model's config.json say that it is quantised."""
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))


NF4 = {**BNB, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "parts"),
    [
        ({"quant_method": "aqlm"}, ["aqlm, whose weights nothing here can read", "by bitnet, bitsandbytes"]),
        ({"quant_method": "nonsense"}, ["nonsense, whose weights nothing here can read"]),
        ({**NF4, "bnb_4bit_quant_tpye": "nf4"}, ["'bnb_4bit_quant_tpye' is no key", "mean 'bnb_4bit_quant_type'"]),
        (torchao("Int4WeightOnlyConfig", group_size=32), ["torchao, which cannot be", "ImportError: Requires mslk"]),
    ],
)  # fmt: skip
def test_model_quantization_is_refused_before_anything_is_loaded(
    quantization: dict[str, Any], parts: list[str], model: Path, tmp_path: Path
) -> None:
    config = write_case(tmp_path, model, data={"num_samples": 4})
    for command in ("check", "score"):
        assert_one_message(plop_dist(command, config, as_override(quantization)), *parts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gptq", "awq", "vptq", "nonsense"])
def test_a_checkpoint_of_a_kind_that_cannot_be_loaded_is_refused(kind: str, model: Path, tmp_path: Path) -> None:
    claim(model, quant_method=kind, bits=4, group_size=32, zero_point=True, version="gemm")
    config = write_case(tmp_path, model, data={"num_samples": 4})
    for command in ("check", "score"):
        assert_one_message(plop_dist(command, config), f"is quantised by {kind}")


@pytest.mark.slow
def test_without_the_extra_the_command_that_installs_it_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers import quantizer_bnb_4bit

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False)
    config = write_case(tmp_path, model, data={"num_samples": 4})
    assert_one_message(
        plop_dist("check", config, as_override(NF4)), "bitsandbytes", "pip install 'plop-dist[quantization]'"
    )


@pytest.mark.parametrize(
    "parallel",
    [{"tp": 2}, {"backend": "deepspeed", "dp": 2, "zero_stage": 3}, {"backend": "megatron", "tp": 2}],
)
def test_layouts_that_cut_weights_take_none_that_are_quantised(
    parallel: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    config = write_case(tmp_path, model, parallel=parallel, data={"num_samples": 4})
    on_load = plop_dist("check", config, as_override(NF4))
    assert_one_message(on_load, "model.quantization is bitsandbytes, but parallel.backend")
    claim(model, **NF4)
    assert_one_message(plop_dist("check", config), "is bitsandbytes, but parallel.backend")


def test_a_mapping_without_its_method_and_a_checkpoint_beside_it_are_refused(model: Path, tmp_path: Path) -> None:
    config = write_case(tmp_path, model, data={"num_samples": 4})
    assert_one_message(plop_dist("check", config, "model.quantization={load_in_4bit: true}"), "quant_method is missing")
    assert_one_message(
        plop_dist("check", config, "model.quantization={quant_method: awq}", "model.checkpoint=x"),
        "model.quantization and model.checkpoint are given together",
    )


def test_an_override_replaces_the_whole_mapping(model: Path, tmp_path: Path) -> None:
    config = write_case(tmp_path, model)
    last = "model.quantization={quant_method: bitsandbytes, load_in_8bit: true}"
    eight = load_config(config, [as_override(NF4), last])
    assert eight.model.quantization == {**BNB, "load_in_8bit": True}
    assert load_config(config, ["model.quantization=null"]).model.quantization is None


@pytest.mark.slow
def test_a_checkpoint_that_is_quantised_is_scored_as_such(model: Path, tmp_path: Path) -> None:
    config = write_case(tmp_path, model, data={"num_samples": 4})
    assert plop_dist("score", config, as_override(NF4)).status == 0
    expected = modules_of(tmp_path / "run")
    stored = tmp_path / "stored"
    quantised: Any = load(model, NF4)
    quantised.save_pretrained(stored)
    for file in model.glob("token*"):
        (stored / file.name).write_bytes(file.read_bytes())
    as_stored = (f"model.name_or_path={stored}", f"run_dir={tmp_path}/2")
    outcome = plop_dist("score", config, *as_stored)
    assert outcome.status == 0, outcome.err
    found = modules_of(tmp_path / "2")
    assert [(one["fqn"], pytest.approx(one["nfn"], rel=1e-3)) for one in found] == [
        (one["fqn"], one["nfn"]) for one in expected
    ]
    outcome = plop_dist("check", config, *as_stored, as_override(NF4))
    assert_one_message(outcome, "model.quantization is bitsandbytes, but", "quantised already, by bitsandbytes")
