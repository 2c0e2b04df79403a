"""Placement against an existing adapter configuration, read as PEFT reads it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from peft.tuners.tuners_utils import check_target_module_exists

from plop_dist.diff import diff, read_adapter_config
from plop_dist.errors import ConfigError, ScoresError
from plop_dist.exporters.peft import lora_config_fields
from plop_dist.exporters.targets import hugging_face_targets
from tests.export_cases import llama_projections, model_of, place, projections_of, scores_of

LLAMA = scores_of(llama_projections(12))


def test_what_only_one_side_adapts_and_what_it_costs():
    found = diff(place(LLAMA, ["v_proj", "o_proj"]), {"r": 8, "target_modules": ["q_proj", "v_proj", "embed_tokens"]})
    assert found.rows() == [("q_proj", 0, 0, 12), ("v_proj", 12, 0, 0), ("o_proj", 0, 12, 0)]
    assert (len(found.both), len(found.only_placement), len(found.only_config)) == (12, 12, 12)
    assert found.num_parameters_placement == 12 * 4 * (48 + 64)
    assert found.num_parameters_config == 12 * 8 * (64 + 48)
    assert (found.num_parameters_both, found.num_parameters_only_placement) == (12 * 4 * 48, 12 * 4 * 64)
    assert found.num_parameters_only_config == 12 * 8 * 64
    assert found.unmatched == ("embed_tokens",)
    assert not found.is_same
    assert "config:    24 modules, rank 8, 10,752 trainable parameters" in found.lines()


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["v_proj", "mlp.up_proj"]},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"target_modules": ["v_proj", "q_proj"], "layers_to_transform": [1, 10]},
        {"target_modules": ["v_proj"], "layers_to_transform": 3, "layers_pattern": "layers"},
        {"target_modules": ["v_proj", "q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["v_proj"], "exclude_modules": r".*\.1\d\..*"},
    ],
)
def test_names_match_as_in_peft(config):
    found = diff(place(LLAMA, ["o_proj"]), config)
    peft_config = SimpleNamespace(**{"target_parameters": None, **config})
    results = {m.fqn: check_target_module_exists(peft_config, m.fqn) for m in LLAMA.modules}
    matched = {fqn for fqn, result in results.items() if result and type(result).__name__ != "_ExcludedModule"}
    assert set(found.only_config) | set(found.both) == matched
    assert matched


@pytest.mark.parametrize("family", ["phi3", "gpt2", "mixtral", "qwen3_next"])
def test_our_own_export_is_no_difference(family):
    placement = place(scores_of(projections_of(model_of(family))), rank_pattern={"o_proj": 16})
    found = diff(placement, lora_config_fields(placement, hugging_face_targets(placement, "peft", False)))
    assert found.is_same
    assert found.lines()[-1] == "no difference"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("[1]", ConfigError, "holds a list"),
        ("{}", ConfigError, "neither target_modules nor target_parameters"),
        ('{"peft_type": "IA3", "target_modules": ["a"]}', ConfigError, "peft_type is 'IA3'"),
        ('{"target_modules": ["a"], "r": 0}', ConfigError, "the rank of r is 0"),
        ('{"target_modules": "(a"}', ConfigError, "not a regular expression"),
        ('{"target_modules": ["a"], "layers_to_transform": "x"}', ConfigError, "expected layer numbers"),
        ('{"target_modules": ["a"], "layers_pattern": "(("}', ConfigError, "not a regular expression"),
        ('{"target_modules": ["a"], "layers_pattern": [3]}', ConfigError, "expected names"),
        ('{"target_modules": [1]}', ConfigError, "expected a list of names"),
        ('{"target_modules": ["a"', ScoresError, "not whole JSON"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, text, error, message):
    path = tmp_path / "adapter_config.json"
    path.write_text(text)
    with pytest.raises(error, match=message):
        read_adapter_config(path)
