"""Whatever a file or an override holds: a configuration comes out of it, or one error that says what is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plop_dist.config.json_schema import json_schema
from plop_dist.config.loading import load_config, parse_config, parse_section
from plop_dist.config.schema import Config, EstimatorConfig, PlacementConfig
from plop_dist.errors import ConfigError, LayoutError
from plop_dist.registry import BACKENDS, EXPORTERS, POLICIES, REWARDS, names

BASE: dict[str, Any] = {"model": {"name_or_path": "some/model"}, "data": {"path": "rows.jsonl"}}
KEYS = [
    key
    for name, section in Config.model_fields.items()
    for key in ([name] + [f"{name}.{inner}" for inner in getattr(section.annotation, "model_fields", ())])
]
SECTIONS = [key for key in KEYS if "." in key]

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.integers(2**62, 10**30)
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner)
)
# what people and fuzzers type: also what is no YAML, an interpolation, a date that is none, a number without end
texts = st.text(max_size=20) | st.sampled_from(
    ["${x}", "${", "2024-13-45", "2024-01-01", "9" * 5000, "1e400", "[", "{a: b", "!!binary x", "&a [*a]", "a: b", "\0"]
)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def holds(call: Any) -> None:
    """Assert that a call returns, or raises an error of ours with a message."""
    try:
        call()
    except (ConfigError, LayoutError) as error:
        text = str(error)
    else:
        text = "a configuration"
    assert text


@quick
@given(key=st.sampled_from(KEYS), value=values)
@pytest.mark.slow
def test_any_value_of_any_key(key: str, value: Any) -> None:
    section, _, inner = key.partition(".")
    tree = {**BASE, section: {**BASE.get(section, {}), inner: value} if inner else value}
    holds(lambda: parse_config(tree))


@quick
@given(text=texts | values.map(lambda value: yaml.safe_dump(value, allow_unicode=True)))
def test_any_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError):
        load_config(file)


@quick
@given(key=st.sampled_from(KEYS), below=st.sampled_from(["", ".0", ".0.x", ".x", ".-1", "[0]", "[", ".."]), text=texts)
@pytest.mark.slow
def test_any_override(tmp_path: Path, key: str, below: str, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**BASE, "export": {"targets": ["peft"]}}))
    holds(lambda: load_config(file, [f"{key}{below}={text}"]))


@pytest.mark.parametrize("key", SECTIONS)
def test_no_key_takes_a_number_that_no_machine_holds(key: str) -> None:
    section, _, inner = key.partition(".")
    kinds = str(Config.model_fields[section].annotation.model_fields[inner])  # type: ignore[union-attr]
    impossible = [10**5000, float("nan"), float("inf"), *([] if "float" in kinds else [10**30, -(10**30)])]
    for value in impossible:
        with pytest.raises(ConfigError, match=f"{section}.{inner}"):
            parse_config({**BASE, section: {**BASE.get(section, {}), inner: value}})


@quick
@given(options=st.dictionaries(st.sampled_from([*PlacementConfig.model_fields, "kk"]), values))
@pytest.mark.slow
def test_any_options_of_one_section(options: dict[str, Any]) -> None:
    holds(lambda: parse_section(PlacementConfig, options, "place options"))


def test_a_section_by_itself_has_the_messages_of_a_whole_configuration() -> None:
    assert parse_section(EstimatorConfig, {}, "score()") == EstimatorConfig()
    with pytest.raises(
        ConfigError, match=r"^score\(\): estimator\.num_directions: .*, but the value is 1 \(Directions"
    ):
        parse_section(EstimatorConfig, {"num_directions": 1}, "score()")
    with pytest.raises(ConfigError, match=r"^here: unknown key 'placement\.kk'\. Did you mean 'k'\?"):
        parse_section(PlacementConfig, {"kk": 1}, "here")
    with pytest.raises(ConfigError, match=r"^here: placement\.policy=threshold needs placement\.threshold"):
        parse_section(PlacementConfig, {"policy": "threshold"}, "here")


def test_the_json_schema_lists_keys_names_and_bounds() -> None:
    tree = json_schema()
    assert tree["properties"].keys() == Config.model_fields.keys()
    assert tree["required"] == ["model", "data"]
    keys = {name: entry["properties"] for name, entry in tree["$defs"].items()}
    assert keys["ParallelConfig"]["backend"]["enum"] == list(names(BACKENDS))
    assert keys["ExportConfig"]["targets"]["items"]["enum"] == list(names(EXPORTERS))
    assert keys["PlacementConfig"]["policy"]["enum"] == list(names(POLICIES))
    known, function = keys["TrainConfig"]["rewards"]["items"]["anyOf"]
    assert known["enum"] == list(names(REWARDS))
    assert re.search(function["pattern"], "package.module:function")
    assert not re.search(function["pattern"], "builtin:numbr")
    assert keys["DataConfig"]["max_length"]["minimum"] == 1
    without = [name for fields in keys.values() for name, field in fields.items() if not field.get("description")]
    assert without == []
