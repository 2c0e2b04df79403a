"""`init` writes a configuration that can be run, `schema` what editors need to complete one."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from plop_dist.config.command_help import COMMANDS
from plop_dist.config.loading import load_config, parse_config
from plop_dist.config.schema import Config
from plop_dist.config.starter import samples
from plop_dist.config.vllm import VLLMConfig
from plop_dist.registry import BACKENDS, EXPORTERS, names
from tests.cli.cases import assert_one_message, plop_dist
from tests.data.test_images import save_image
from tests.models import save_tiny
from tests.vlms import save_tiny_processor, save_tiny_vlm

CONFIGS = Path(__file__).parents[2] / "configs"
EXAMPLES = CONFIGS.parent / "launchers" / "examples"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def uncommented(text: str) -> str:
    """Return a configuration with every key active that stood behind a #."""
    return re.sub(r"^( *)#(\w)", r"\1\2", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"text": "a"}, {}),
        ({"messages": [{"role": "user", "content": "a"}], "id": 1}, {"messages_field": "messages"}),
        ({"question": "a", "answer": "b"}, {"template": "{question}\n{answer}"}),
        ({"body": "a"}, {"text_field": "body"}),
    ],
)
def test_init_finds_the_text_and_what_it_writes_is_checked(
    here: Path, row: dict[str, Any], keys: dict[str, str]
) -> None:
    save_tiny("llama", here / "model")
    (here / "rows.jsonl").write_text(json.dumps(row) + "\n")
    written = plop_dist("init", "--model", "model", "--data", "rows.jsonl", "--output", "mine.yaml")
    assert (written.status, written.out) == (0, "mine.yaml\n")
    config = load_config("mine.yaml")
    given = {"run_dir": "runs/mine", "model": {"name_or_path": "model"}, "data": {"path": "rows.jsonl", **keys}}
    assert config == parse_config(given)
    command = written.err.split("Next: plop-dist ")[1].split()
    checked = plop_dist(*command)
    assert checked.status == 0, checked.err


def test_every_key_is_there_and_removing_the_marks_changes_nothing(here: Path) -> None:
    assert plop_dist("init", "--model", "m", "--data", "builtin:arithmetic").status == 0
    text = Path("config.yaml").read_text()
    tree = yaml.safe_load(uncommented(text))
    assert set(tree) == set(Config.model_fields)
    for name, field in Config.model_fields.items():
        if name != "run_dir":
            assert set(tree[name]) == set(getattr(field.annotation, "model_fields", {}))
    assert set(tree["train"]["vllm"]) == set(VLLMConfig.model_fields)
    assert parse_config(tree) == load_config("config.yaml")
    assert max(map(len, text.splitlines())) <= 120
    assert all(name in text for name in names(EXPORTERS))


def test_unknown_columns_and_hub_data_are_said(here: Path) -> None:
    Path("rows.jsonl").write_text('{"left": "a", "right": "b"}\n')
    unknown = plop_dist("init", "--model", "m", "--data", "rows.jsonl", "--output", "a.yaml")
    assert (unknown.status, "note: rows.jsonl has the columns left, right;" in unknown.err) == (0, True)
    hub = plop_dist("init", "--model", "m", "--data", "openai/gsm8k:main", "--output", "b.yaml")
    assert (hub.status, "note: openai/gsm8k:main is not looked at here" in hub.err) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--model and --data", "--demo"]),
        (["--model", "m"], ["--model and --data"]),
        (["--demo", "--data", "d.jsonl"], ["--demo brings its own"]),
        (["--model", "m", "--data", "nowhere.jsonl"], ["'nowhere.jsonl' does not exist"]),
        (["--demo", "--output", "there.yaml"], ["there.yaml exists already"]),
        (["--demo", "--output", "there.yaml/x.yaml"], ["there.yaml/x.yaml"]),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_overwritten(
    here: Path, arguments: list[str], parts: list[str]
) -> None:
    Path("there.yaml").write_text("mine")
    assert_one_message(plop_dist("init", *arguments), *parts)
    assert os.listdir(here) == ["there.yaml"]
    assert Path("there.yaml").read_text() == "mine"


def test_the_demo_is_the_checkout_s_quickstart(here: Path) -> None:
    assert plop_dist("init", "--demo").out == "quickstart.yaml\n"
    assert Path("quickstart.yaml").read_text() == (CONFIGS / "quickstart.yaml").read_text()
    assert (CONFIGS / "quickstart.yaml").is_symlink(), "two copies"


def test_the_schema_takes_what_the_program_takes(here: Path) -> None:
    schema = json.loads(plop_dist("schema").out)
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    for path in CONFIGS.glob("*.yaml"):
        validator.validate(yaml.safe_load(path.read_text()))
    plop_dist("init", "--model", "m", "--data", "builtin:arithmetic")
    validator.validate(yaml.safe_load(Path("config.yaml").read_text()))
    sections = schema["$defs"]
    assert sections["ParallelConfig"]["properties"]["backend"]["enum"] == list(names(BACKENDS))
    assert sections["ExportConfig"]["properties"]["targets"]["items"]["enum"] == list(names(EXPORTERS))


@pytest.mark.parametrize(
    "section",
    [
        {"modle": {}},
        {"parallel": {"backend": "megatorn"}},
        {"parallel": {"tp": 0}},
        {"export": {"targets": ["pefft"]}},
        {"placement": {"policy": "lowest"}},
        {"data": {"num_samples": 3}},
    ],
)
def test_the_schema_refuses_what_the_program_refuses(section: dict[str, Any]) -> None:
    schema = json.loads(plop_dist("schema").out)
    tree = {"model": {"name_or_path": "m"}, "data": {"path": "d"}, **section}
    assert list(jsonschema.Draft202012Validator(schema).iter_errors(tree))


def shrunk(config: Path, here: Path) -> list[str]:
    """Return overrides that put a tiny model and rows of this directory into the place of what lies on a hub."""
    loaded = load_config(config)
    overrides = []
    if not loaded.model.name_or_path.startswith("builtin:"):
        family = "qwen3_moe" if config.stem == "moe" else "llama"
        sizes: dict[str, Any] = {
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 8,
        }
        if loaded.data.images_field is not None:
            save_tiny_processor("llava", save_tiny_vlm("llava", here / "model"))
        else:
            save_tiny(family, here / "model", **sizes)
        overrides += [f"model.name_or_path={here / 'model'}"]
    if loaded.model.checkpoint is not None:
        left = here / loaded.model.checkpoint / "global_step1000" / "mp_rank_00_model_states.pt"
        left.parent.mkdir(parents=True)
        left.touch()
        (left.parents[1] / "latest").write_text(left.parent.name)
    if not loaded.data.path.startswith("builtin:"):
        row = {"question": "a", "answer": "b", "messages": [{"role": "user", "content": "c"}]}
        if loaded.data.images_field is not None:
            save_image(here / "a.png")
            row |= {"images": ["a.png"]}
        (here / "rows.jsonl").write_text((json.dumps(row) + "\n") * 240)
        overrides += [f"data.path={here / 'rows.jsonl'}"]
    return overrides


def each_config() -> list[Any]:
    """Return a case per configuration; the model of the quickstart is converted when it is first asked for."""
    return [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in ("quickstart", "grpo") else [])
        for path in sorted(CONFIGS.glob("*.yaml"))
    ]


@pytest.mark.parametrize("config", each_config())
def test_the_configurations_of_the_checkout_pass_check(here: Path, config: Path) -> None:
    outcome = plop_dist("check", config, *shrunk(config, here))
    assert outcome.status == 0, outcome.err
    assert f"Ranks: {load_config(config).parallel.world_size}" in outcome.out


def test_samples_are_listed_and_are_the_checkout_s(here: Path) -> None:
    nothing = plop_dist("init")
    for name, text in samples().items():
        assert f" {name}" in nothing.err
        assert f"`{name}`" in COMMANDS["init"]
        assert text
        own = EXAMPLES / "pytorch_loop.py" if name == "plugin" else CONFIGS / f"{name}.yaml"
        assert own.is_symlink(), "two copies"
        assert plop_dist("init", "--sample", name).status == 0
        assert Path(f"{name}{own.suffix}").read_text() == own.read_text()
    assert {path.stem for path in CONFIGS.glob("*.yaml")} | {"plugin"} == {*samples(), "quickstart"}
    assert_one_message(plop_dist("init", "--sample", "mo"), "Did you mean 'moe'?", "hand-off")


def test_a_checkpoint_that_is_not_there_is_not_ok(here: Path) -> None:
    config = CONFIGS / "hand-off.yaml"
    overrides = shrunk(config, here)
    (here / "checkpoints" / "latest").write_text("global_step9")
    assert_one_message(plop_dist("check", config, *overrides), "model.checkpoint 'checkpoints' names 'global_step9'")
