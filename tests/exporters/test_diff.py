"""Placement against an existing adapter configuration, read as PEFT reads it."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists

from plop_dist.errors import ConfigError, ScoresError
from plop_dist.exporters.adapter_config import read_adapter_config
from plop_dist.exporters.diff import diff
from plop_dist.exporters.holders import hugging_face_targets
from plop_dist.exporters.peft import lora_config_fields
from tests.exporters.cases import adapted_paths, llama_projections, model_of, place, projections_of, scores_of

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


def test_says_what_it_does_not_count_and_what_matches_nothing():
    found = diff(place(LLAMA, ["v_proj"]), {"r": 4, "target_modules": ["v_proj"], "use_dora": True, "bias": "all",
                                            "modules_to_save": ["lm_head"]})  # fmt: skip
    assert not found.is_same
    assert found.lines()[-1] == (
        "trained beside A and B under the config, and not counted: modules_to_save, use_dora, bias"
    )
    fused = place(scores_of(projections_of(model_of("phi3"))))
    for targets in (".*[.]q_proj", ["q_proj"]):
        found = diff(fused, {"target_modules": targets})
        assert "the config adapts no scored module: PEFT refuses it" in found.lines()[-1]
    assert found.unmatched == ("q_proj",)


CONFIGS = [
    {"target_modules": "all-linear"},
    {"target_modules": r".*(q_proj|down_proj|up_proj|gate_proj)"},
    {"target_modules": ["gate_proj", "up_proj", "down_proj"], "r": 3},
    {"target_modules": ["gate"]},
    {"target_modules": ["w1", "w2", "w3", "query_key_value"], "rank_pattern": {"down_proj": 3}},
    {"target_modules": ["q_proj", "c_attn"], "target_parameters": ["experts.gate_up_proj"]},
    {"target_modules": ["qkv_proj", "c_fc", "dense", "o_proj"], "exclude_modules": ".*layers[.]0[.].*"},
]


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox", "mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config["target_modules"])[:20])
def test_adapts_what_peft_adapts_in_the_model(family, config):
    model = copy.deepcopy(model_of(family))
    scores = scores_of(projections_of(model))
    info = scores.model.model_copy(update={"model_type": model.config.model_type})
    placement = place(scores.model_copy(update={"model": info}), where=lambda item: item.layer == 0)
    try:
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    except ValueError as error:
        if "not found in the base model" in str(error):
            assert not diff(placement, config).num_parameters_config
        else:
            with pytest.raises(ConfigError, match="PEFT refuses this configuration for"):
                diff(placement, config)
        return
    found = diff(placement, config)
    paths = {*found.only_config, *found.both}
    holders = {item.holder.removesuffix(".weight") for item in scores.modules if item.fqn in paths}
    assert holders == adapted_paths(adapted)
    assert found.num_parameters_config == adapted.get_nb_trainable_parameters()[0]


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
