"""The configuration: strict, validated before anything starts, with errors that name key, value and remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from plop_dist.config.loading import load_config, parse_config, split_override
from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError, LayoutError

BASE = "model: {name_or_path: some/model}\ndata: {path: rows.jsonl}\n"


def load(tmp_path: Path, *overrides: str, text: str = BASE) -> Config:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return load_config(file, overrides)


def test_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.data.num_samples, config.data.max_length, config.data.batch_size) == (200, 256, 8)
    assert (config.estimator.baseline, config.estimator.num_directions) == ("control_variate", 64)
    assert (config.placement.policy, config.placement.k, config.placement.exclude) == ("lowest_k", 3, ["lm_head"])
    assert (config.placement.rank, config.placement.alpha, config.parallel.world_size) == (16, 32, 1)
    assert config.run_path == Path("runs/default")


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("data.template={question}\\n{answer}", "data.template", "{question}\n{answer}"),
        ("data.template={question}: {answer}", "data.template", "{question}: {answer}"),
        ("data.template=null", "data.template", None),
        ("train.learning_rate=2e-4", "train.learning_rate", 2e-4),
        ("train.learning_rate=1E-3", "train.learning_rate", 1e-3),
        ("placement.alpha=8", "placement.alpha", 8.0),
        ("data.num_samples=64", "data.num_samples", 64),
        ("data.shuffle=true", "data.shuffle", True),
        ("data.text_field=text", "data.text_field", "text"),
        ("placement.exclude=[lm_head, q_proj]", "placement.exclude", ["lm_head", "q_proj"]),
        ("placement.rank_pattern={v_proj: 32}", "placement.rank_pattern", {"v_proj": 32}),
        ("model.name_or_path=Qwen/Qwen2.5-0.5B", "model.name_or_path", "Qwen/Qwen2.5-0.5B"),
        ("run_dir=runs/a=b", "run_dir", "runs/a=b"),
    ],
)
def test_overrides(tmp_path: Path, override: str, place: str, value: Any) -> None:
    found: Any = load(tmp_path, override)
    for part in place.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_later_overrides_win_and_the_rest_of_a_section_stays(tmp_path: Path) -> None:
    config = load(tmp_path, "placement={k: 2, rank: 4}", "placement.k=5")
    assert (config.placement.k, config.placement.rank, config.placement.alpha) == (5, 4, 32)
    assert config.data.path == "rows.jsonl"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.num_sample=3", r"unknown key 'data\.num_sample'\. Did you mean 'num_samples'\?"),
        ("paralel.tp=2", r"unknown key 'paralel'\. Did you mean 'parallel'\?"),
        ("data.num_samples=many", r"data\.num_samples: .* but the value is 'many' \(Calibration samples"),
        ("data.num_samples=0", r"data\.num_samples: .*greater than or equal to 1, but the value is 0"),
        ("placement.alpha=-1", r"placement\.alpha: .*greater than 0"),
        (
            "parallel.backend=megatorn",
            r"parallel\.backend: unknown backend 'megatorn'\. Did you mean 'megatron'\? Available: deepspeed, ",
        ),
        ("data.num_samples=true", r"data\.num_samples: expected a number, but the value is True"),
        ("train.learning_rate=inf", r"train\.learning_rate: .*finite number"),
        ("placement.rank_pattern={v_proj: 0}", r"placement\.rank_pattern\.v_proj: .*greater than or equal to 1"),
        ("run_dir=", r"run_dir: .*at least 1 character"),
        ("data.text_field=", r"data\.text_field: .*at least 1 character"),
        ("cluster.gpus_per_worker=many", r"cluster\.gpus_per_worker: expected a number from 0 to .*, or 'auto'"),
        (
            "data.path=https://me:hidden@h.example/d",
            r"data\.path holds a user, password or token before the @ \(https://\[redacted\]@h",
        ),
        ("data.path=???", r"data\.path"),
        ("tp=2", r"unknown key 'tp'\. Did you mean 'parallel\.tp'\?"),
        ("export.targets=[peft, trll]", r"export\.targets: unknown export target 'trll'\. Did you mean 'trl'\?"),
        ("data.num_samples", r"Override 'data\.num_samples' is not key=value"),
        ("=3", "is not key=value"),
        (
            "parallel.zero_stage=3",
            r"zero_stage is 3, but parallel\.backend 'transformers' has no ZeRO; use parallel\.backend=deepspeed, or ",
        ),
        (
            "parallel.pp=2",
            r"parallel\.pp is 2, but parallel\.backend 'transformers' has no pipeline; use parallel\.backend="
            r"deepspeed or megatron, or parallel\.pp=1",
        ),
        ("parallel.cp=2", r"has no context parallelism; use parallel\.backend=megatron, or parallel\.cp=1"),
        ("parallel={dp: 2, ep: 2}", r"has no expert parallelism; use parallel\.backend=megatron, or parallel\.ep=1"),
        (
            "parallel.sequence_parallel=true",
            r"sequence_parallel is true, .* has no sequence parallelism; set parallel\.sequence_parallel=false",
        ),
        (
            "parallel={backend: megatron, sequence_parallel: true}",
            r"sequence_parallel is true, but parallel\.tp is 1; .*set parallel\.tp to 2 or more",
        ),
        (
            "parallel={backend: deepspeed, tp: 2, pp: 2}",
            r"deepspeed cannot combine tp 2, pp 2 and zero_stage 0; use one of tp and pp",
        ),
        (
            "parallel={backend: deepspeed, tp: 2, zero_stage: 2}",
            r"deepspeed cannot combine tp 2, pp 1 and zero_stage 2",
        ),
        (
            "parallel.backend=torch",
            r"'torch' loads no model, .*plop_dist\.score.*use parallel\.backend=transformers or deepspeed or megatron",
        ),
        ("placement.policy=budget", r"policy=budget needs placement\.max_trainable_parameters"),
        ("placement.policy=threshold", r"policy=threshold needs placement\.threshold"),
        ("placement.options={share: 1}", r"'share' is no option of policy 'lowest_k'. It takes none"),
        ('run_dir="runs/\\ud800"', r"run_dir: .*whole Unicode text, but the value is 'runs/.ud800'"),
        ('placement.exclude=["\\ud800"]', "is not whole Unicode text"),
        ("data.text_field=\udcff", r"data\.text_field: .*whole Unicode text"),
        ("data.split=\udcff", r"'.udcff' is not whole Unicode text"),
        ("parallel.backend=\udc80", r"udc80. holds what is no whole Unicode character"),
    ],
)
def test_a_mistake_names_key_value_and_remedy(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, override)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("[builtin:numbr]", "unknown reward 'builtin:numbr'. Did you mean 'builtin:number'?"),
        ("[number]", "'number' is neither builtin:number, builtin:format nor module:function"),
        ("[builtin:number,builtin:number]", "a reward 'number' is in the list already"),
        ("[]", "train.rewards is empty"),
    ],
)
def test_rewards_are_names_of_rewards(tmp_path: Path, names: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(tmp_path, f"train.rewards={names}")


def test_ranks_must_fit_the_workers(tmp_path: Path) -> None:
    sizes = ("parallel.backend=megatron", "parallel.tp=3", "parallel.pp=2")
    with pytest.raises(
        ConfigError,
        match=r"parallel\.tp \(3\) \* parallel\.pp \(2\) \* parallel\.dp \(1\) = 6, but cluster\.num_workers is 8; "
        r"set parallel\.dp or use 6 workers",
    ):
        load(tmp_path, *sizes, "cluster.num_workers=8")
    assert load(tmp_path, *sizes, "cluster.num_workers=6").parallel.world_size == 6
    with pytest.raises(LayoutError, match=r"parallel\.ep \(4\) does not divide"):
        load(tmp_path, *sizes, "parallel.ep=4")


def test_two_sources_of_text_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.text_field and data\.template are given together"):
        load(tmp_path, "data.text_field=text", "data.template={text}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {path: x}\n", r"key 'model' is required and missing"),
        ("model: {}\ndata: {path: x}\n", r"key 'model\.name_or_path' is required and missing; add"),
        ("- a\n- b\n", "does not hold a mapping"),
        (BASE + "model: {name_or_path: b}\n", "found duplicate key model .* line 3"),
        ("model: {name_or_path: [\n", "cannot be read as YAML"),
        (
            "model: some/model\ndata: {path: x}\n",
            r"model: the value is 'some/model', expected a section with the keys name_or_path",
        ),
        ("", "key 'model' is required and missing|does not hold a mapping"),
    ],
)
def test_a_malformed_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text=text)


def test_a_section_without_keys_is_the_default(tmp_path: Path) -> None:
    assert load(tmp_path, text=BASE + "parallel:\n  # tp: 2\n").parallel.tp == 1


def test_a_missing_file_and_every_mistake_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'absent\.yaml' does not exist; pass the path of a YAML file"):
        load_config("absent.yaml")
    with pytest.raises(ConfigError) as caught:
        parse_config({"model": {"name_or_path": "m", "dtyp": 1}, "data": {"path": "d", "seed": "x"}})
    assert len(str(caught.value).splitlines()) == 2


def test_a_value_with_an_equals_sign_or_not_yaml() -> None:
    assert split_override("a.b=c=d") == ("a.b", "c=d")
    assert split_override("a.b=") == ("a.b", "")
    assert split_override("a.b={unclosed") == ("a.b", "{unclosed")
    assert split_override("a.b=1.5e3") == ("a.b", 1500.0)
    assert split_override("a.b=Llama-3e") == ("a.b", "Llama-3e")


@pytest.mark.parametrize(
    "key", ["run_dir", "model.name_or_path", "model.checkpoint", "data.path", "train.data_path", "train.eval_path"]
)
@pytest.mark.parametrize("value", ["a" * 256, "/x" * 2048, "b" * 300 + "/c"])
def test_a_path_that_no_filesystem_takes_is_refused_by_its_key(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: expected a path of at most 4,095 bytes"):
        load(tmp_path, f"{key}={value}")


@pytest.mark.parametrize(
    ("train", "longest"),
    [
        ({"method": "none", "max_length": 900}, 100),
        ({"method": "sft", "max_length": 900}, 900),
        ({"method": "sft", "max_length": 50}, 100),
        ({"method": "grpo", "max_completion_length": 2000}, 2100),
        ({"method": "grpo", "max_completion_length": 2000, "engine": "verl"}, 100),
    ],
)
def test_how_far_rows_reach_here_is_known_by_who_trains(train: dict[str, Any], longest: int) -> None:
    more = {"rewards": ["builtin:number"]} if train["method"] == "grpo" else {}
    tree = {"model": {"name_or_path": "m"}, "data": {"path": "d", "max_length": 100}, "train": {**train, **more}}
    assert parse_config(tree).longest_row == longest
