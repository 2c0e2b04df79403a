"""Placement against an existing adapter configuration, read as PEFT reads it."""

from __future__ import annotations

import copy
import importlib
import json
import random
import re
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists

from plop_dist.errors import ConfigError, ScoresError
from plop_dist.exporters import peft_match
from plop_dist.exporters.adapter_config import read_adapter_config
from plop_dist.exporters.diff import diff
from plop_dist.exporters.holders import hugging_face_targets
from plop_dist.exporters.peft import lora_config_fields
from plop_dist.exporters.peft_match import adapted_ranks
from plop_dist.exporters.stand_in import stand_in
from plop_dist.values import time_limit
from plop_dist.values.scores import Projection
from tests import payloads
from tests.exporters.cases import (
    adapted_paths,
    llama_projections,
    model_of,
    place,
    projection,
    projections_of,
    scores_of,
)

LLAMA = scores_of(llama_projections(12))
EVIL = "(([a-z_.0-9]+)+)+!"


def test_no_module_that_a_configuration_names_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT before 0.21 imports `megatron_core`, and for its Auto classes `parent_library`."""
    marker = tmp_path / "marker"
    payloads.module(tmp_path / "theirs.py", marker)
    monkeypatch.syspath_prepend(tmp_path)
    named = {"megatron_config": {"a": 1}, "megatron_core": "theirs", "runtime_config": {"a": 1},
             "auto_mapping": {"base_model_class": "Theirs", "parent_library": "theirs"}}  # fmt: skip
    tree = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], **named}
    (tmp_path / "adapter_config.json").write_text(json.dumps(tree))
    found = diff(place(LLAMA, ["q_proj"]), read_adapter_config(tmp_path / "adapter_config.json"))
    assert len(found.both) == 12
    assert not marker.exists()
    assert payloads.fires(marker, lambda: importlib.import_module("theirs"))


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
        ('{"target_modules": ["a"], "rank_pattern": [["a", 4]]}', ConfigError, "expected an object of name to rank"),
        ('{"target_modules": ["a"], "rank_pattern": {"a": "4"}}', ConfigError, "the rank of a is '4'"),
        ('{"target_modules": ["a"], "rank_pattern": {"(a": 4}}', ConfigError, "rank_pattern: '.a' is not a regular"),
        ('{"target_modules": ["a"], "alpha_pattern": "a"}', ConfigError, "alpha_pattern is 'a', expected an object of"),
        ('{"target_modules": ["a"], "alpha_pattern": {"a": null}}', ConfigError, "the alpha of 'a' is None"),
        ('{"target_modules": ["a"], "alpha_pattern": {"(a": 4}}', ConfigError, "alpha_pattern: '.a' is not a regular"),
        ('{"target_modules": ["a"], "lora_alpha": NaN}', ConfigError, "the alpha of 'lora_alpha' is nan"),
        ('{"target_modules": ["a"], "r": 1000000000000}', ConfigError, "the rank of r is 1000000000000, expected"),
        (
            '{"target_modules": ["a"], "modules_to_save": "lm_head"}',
            ConfigError,
            "modules_to_save is 'lm_head', expect",
        ),
        ('{"target_modules": ["a"], "exclude_modules": {}}', ConfigError, "exclude_modules is {}, expected a list"),
        ('{"target_modules": ["a"], "layers_pattern": 3}', ConfigError, "layers_pattern is 3, expected names"),
        (json.dumps({"target_modules": "(" * 9000}), ConfigError, "target_modules: '.{79} is not a regular expression"),
        (
            json.dumps({"target_modules": ["a"], "modules_to_save": [f"m{number}" for number in range(101)]}),
            ConfigError,
            "modules_to_save holds 101 names, expected at most 100",
        ),
        ('{"target_modules": ["a"', ScoresError, "not whole JSON"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, text, error, message):
    path = tmp_path / "adapter_config.json"
    path.write_text(text)
    with pytest.raises(error, match=message):
        read_adapter_config(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", EVIL),
        ("exclude_modules", EVIL),
        ("layers_pattern", ["layers", EVIL]),
        ("modules_to_save", ["lm_head", EVIL]),
        ("rank_pattern", {"v_proj": 4, EVIL: 4}),
    ],
)
@pytest.mark.slow
def test_a_pattern_that_takes_for_ever_is_named_in_time(field, value, monkeypatch):
    monkeypatch.setattr(peft_match, "check_time", partial(time_limit.check_time, limit_s=1.0))
    begun = time.monotonic()
    message = rf"^there: {field} {re.escape(repr(EVIL))} takes more than 1 s to match the model's \d+ names; write a"
    with pytest.raises(ConfigError, match=message):
        diff(place(LLAMA, ["v_proj"]), {"target_modules": ["v_proj"], field: value}, "there")
    assert time.monotonic() - begun < 8


def test_patterns_have_a_few_seconds_in_all_and_alphas_are_not_matched():
    assert 1 < time_limit.LIMIT_S < 8
    found = diff(place(LLAMA, ["v_proj"]), {"r": 4, "target_modules": ["v_proj"], "alpha_pattern": {EVIL: 4}})
    assert found.is_same


def whole(config: dict[str, Any], projections: list[Projection], model_type: str) -> dict[str, int] | None:
    """Return the ranks of what PEFT adapts in all of the model, given all of the configuration; None: it refuses."""
    by_holder: dict[str, list[Projection]] = {}
    for item in projections:
        by_holder.setdefault(item.holder, []).append(item)
    model = stand_in(by_holder, model_type)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(LoraConfig(**config), model, low_cpu_mem_usage=True)
    except Exception as error:
        return {} if "not found in the base model" in str(error) else None
    ranks = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            path = ".".join(filter(None, (name.replace(".base_layer", ""), getattr(module, "parameter_name", None))))
            ranks[path if path in by_holder else path.removesuffix(".weight")] = module.r["default"]
    return ranks


def made_up_config(draw: random.Random, paths: list[str]) -> dict[str, Any]:
    def some(least: int, most: int) -> list[str]:
        ends = [path.split(".") for path in draw.choices(paths, k=draw.randint(least, most))]
        return [".".join(parts[draw.randrange(len(parts)) :]) for parts in ends]

    renamed = ["gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate", "mlp.gate_proj", "layers.0.mlp.up_proj"]
    config: dict[str, Any] = {
        "r": draw.randint(1, 9),
        "target_modules": some(0, 4) + draw.sample(renamed, draw.randint(0, 3)),
    }
    forms = [lambda name: name, re.escape, lambda name: f"^{re.escape(name)}", lambda name: f"^{name}",
             lambda name: f".*{name}", lambda name: f"{name}.weight", lambda name: r".*\.gate_up_proj"]  # fmt: skip
    for field, value, share in (
        ("target_parameters", [name + draw.choice(["", ".weight"]) for name in some(1, 3)], 0.35),
        ("exclude_modules", draw.choice([some(1, 3), r".*layers\.0\..*"]), 0.3),
        ("modules_to_save", draw.choice([["lm_head"], ["embed_tokens"], some(1, 1)]), 0.2),
        ("layers_to_transform", draw.choice([0, [1], [0, 1]]), 0.15),
        ("rank_pattern", {draw.choice(forms)(name): draw.randint(1, 30) for name in some(1, 5)}, 0.6),
    ):
        if draw.random() < share:
            config[field] = value
    return config


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral", "qwen3_moe", "qwen3_next"])
@pytest.mark.slow
def test_asked_about_one_module_of_each_kind_peft_says_what_it_says_of_all(family):
    projections, model_type = projections_of(model_of(family)), model_of(family).config.model_type
    paths = sorted({item.holder for item in projections} | {item.fqn for item in projections})
    draw = random.Random(family)
    num_adapted, num_refused = 0, 0
    for _ in range(60):
        config = made_up_config(draw, paths)
        if not config["target_modules"] and not config.get("target_parameters"):
            continue
        expected = whole(copy.deepcopy(config), projections, model_type)
        if expected is None:
            num_refused += 1
            with pytest.raises(ConfigError, match="there: PEFT refuses this configuration"):
                adapted_ranks(config, projections, model_type, "there")
        else:
            num_adapted += bool(expected)
            assert adapted_ranks(config, projections, model_type, "there") == expected, config
    assert num_adapted > 15
    assert num_refused


def test_what_peft_is_asked_does_not_grow_with_the_model(monkeypatch):
    sizes = []

    def counted(by_holder, model_type):
        sizes.append(len(by_holder))
        return stand_in(by_holder, model_type)

    monkeypatch.setattr(peft_match, "stand_in", counted)
    for num_layers in (10, 80):
        experts = "model.layers.0.mlp.experts"  # beside them PEFT does more than match
        expert = projection(f"{experts}.0.down_proj", 32, 4, "expert_parameter", f"{experts}.down_proj")
        scores = scores_of([*llama_projections(num_layers), expert])
        placement = place(scores, where=lambda item: (item.layer or 0) % 3 == 0 and "experts" not in item.fqn)
        ranks = {f"^{re.escape(path)}": 1 + number % 7 for number, path in enumerate(placement.modules)}
        found = diff(placement, {"r": 4, "target_modules": list(placement.modules), "rank_pattern": ranks})
        assert set(found.both) == set(placement.modules)
        assert not found.only_config
        counts = {module.fqn: 1 + number % 7 for number, module in enumerate(placement.chosen)}
        assert found.num_parameters_config == sum(
            counts[module.fqn] * (module.in_features + module.out_features) for module in placement.chosen
        )
    assert sizes[0] == sizes[1] < 20


def test_experts_that_a_file_names_as_parameters_need_no_peft(monkeypatch):
    """Importing it takes seconds; there is nothing that it would do besides matching."""
    experts = [
        projection(f"model.layers.{layer}.mlp.experts.{expert}.down_proj", 32, 4, "expert_parameter",
                   f"model.layers.{layer}.mlp.experts.down_proj")
        for layer in range(3) for expert in range(4)
    ]  # fmt: skip
    placement = place(scores_of([*llama_projections(3), *experts]), where=lambda item: item.layer == 1)
    named = ["model.layers.1.mlp.experts.down_proj"]
    config = {"r": 4, "target_modules": ["layers.1.self_attn.v_proj"], "target_parameters": named}
    asked = []
    monkeypatch.setattr(peft_match, "stand_in", lambda *given: asked.append(given) or stand_in(*given))
    plain = diff(placement, config)
    assert not asked
    assert len(plain.both) == 5
    monkeypatch.setattr(peft_match, "_plainly", lambda *given: None)
    assert diff(placement, config) == plain
    assert asked


@pytest.mark.slow
def test_more_names_than_a_model_has_modules_take_no_time():
    names = [f"embed_{number}" for number in range(600_000)]
    begun = time.monotonic()
    found = diff(place(LLAMA, ["v_proj"]), {"target_modules": [*names, "v_proj"], "exclude_modules": names})
    assert found.num_parameters_config == found.num_parameters_placement * 2
    with pytest.raises(ConfigError, match=r"there: target_modules holds 600,000 names, too many beside a regular expr"):
        diff(place(LLAMA, ["v_proj"]), {"target_modules": names, "layers_to_transform": 1}, "there")
    assert time.monotonic() - begun < 20
