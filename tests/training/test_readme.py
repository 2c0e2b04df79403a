"""What plop_dist/training/README.md tells others to write is done: a training engine, and a reward by entry point."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plop_dist import registry
from plop_dist.config.loading import parse_config
from plop_dist.errors import ConfigError
from plop_dist.training import rewards
from plop_dist.training import train as training
from plop_dist.training.train import train
from tests.models import tiny
from tests.training.cases import (
    CUT_AFTER,
    RESUMED_STEPS,
    KilledError,
    Rows,
    check_run,
    load_placement,
    make_config,
    make_placement,
    prepare,
)

README = Path(training.__file__).with_name("README.md")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on the path for somebody else's modules and for what installing them leaves."""
    directory = tmp_path / "packages"
    directory.mkdir()
    monkeypatch.syspath_prepend(str(directory))
    before = set(sys.modules)
    registry._foreign.cache_clear()
    yield directory
    registry._foreign.cache_clear()
    for name in set(sys.modules) - before:
        if str(directory) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def install(packages: Path, name: str, entry_points: str) -> None:
    """Leave what an installed package leaves, so that its entry points are found."""
    installed = packages / f"{name}-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(entry_points)
    importlib.invalidate_caches()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.S)


RECORD = """
from plop_dist.backends.record import BackendRecord


class Whole(BackendRecord):
    name = "whole"
    keys = ()

    def training_engine(self, config):
        return ENGINE


RECORD = Whole()
"""


def install_engine(packages: Path, engine: str) -> None:
    """Install the README's engine with a backend "whole" whose record names it."""
    (code,) = [block for block in blocks("python") if "class WholeEngine" in block]
    (packages / "whole_engine.py").write_text(code)
    (packages / "whole_record.py").write_text(RECORD.replace("ENGINE", repr(engine)))
    install(packages, "whole", "[plop_dist.backends]\nwhole = whole_record:RECORD\n")


@pytest.mark.parametrize("engine", ["whole", "whole_engine:ENGINE"])
@pytest.mark.slow
def test_the_engine_of_the_readme_trains_like_plain_peft(
    tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    install_engine(packages, engine)
    own = {**registry.TRAINING_ENGINES.own, "whole": "whole_engine:ENGINE"}  # the line of the registry
    monkeypatch.setattr(training, "TRAINING_ENGINES", replace(registry.TRAINING_ENGINES, own=own))
    expected = prepare(tmp_path, "llama")
    options: dict[str, Any] = {"backend": "whole", "train": {"gradient_accumulation_steps": 4}}
    config, placement = make_config(tmp_path / "model", tmp_path / "run", **options), load_placement(tmp_path)
    records: list[dict[str, Any]] = []
    result = train(config, placement, records.append, data=Rows())
    check_run(expected, {"records": records, "result": result}, tmp_path, "llama")

    config = make_config(tmp_path / "model", tmp_path / "cut", **options)

    def die(record: dict[str, Any]) -> None:
        if record["step"] == CUT_AFTER:
            raise KilledError

    with pytest.raises(KilledError):
        train(config, placement, die, data=Rows())
    resumed: list[dict[str, Any]] = []
    result = train(config, placement, resumed.append, data=Rows())
    assert [record["step"] for record in resumed] == RESUMED_STEPS
    check_run(expected, {"records": resumed, "result": result}, tmp_path, "llama")


def test_the_engine_of_the_readme_is_followed_on_the_way(tmp_path: Path, packages: Path) -> None:
    install_engine(packages, "whole_engine:ENGINE")
    prepare(tmp_path, "llama")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"{i} and {7 * i}"}) for i in range(8)))
    options = {"max_steps": 2, "track_nfn_every": 1}
    config = make_config(tmp_path / "model", tmp_path / "run", backend="whole", train=options)
    data = config.data.model_copy(update={"path": str(tmp_path / "rows.jsonl")})
    records: list[dict[str, Any]] = []
    train(config.model_copy(update={"data": data}), load_placement(tmp_path), records.append, data=Rows())
    followed = {record["step"]: record["nfn"] for record in records if "nfn" in record}
    assert sorted(followed) == [0, 1, 2]
    assert followed[0]["v_proj"] != followed[2]["v_proj"]
    assert followed[0].keys() == {module.type for module in load_placement(tmp_path).source.modules}


def test_an_unknown_engine_and_a_method_that_an_engine_lacks_are_named(
    tmp_path: Path, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placement = make_placement(tiny("llama"))
    install_engine(packages, "auto_tp")
    config = make_config(tmp_path, tmp_path, backend="whole")
    with pytest.raises(ConfigError, match=r"Unknown training engine 'auto_tp'\. Did you mean 'autotp'\? Available: "):
        train(config, placement, print)
    monkeypatch.setattr(training, "engine_name", lambda config: "verl")
    with pytest.raises(ConfigError, match=r"train\.method is 'sft', but the training engine 'verl' knows only grpo"):
        train(config, placement, print)


def test_the_table_of_engines_is_the_registrys() -> None:
    listed = {name for row in re.findall(r"^\| (`.*?`) \|", README.read_text(), flags=re.M) for name in row.split(", ")}
    known = {*registry.names(registry.TRAINING_ENGINES), *registry.names(registry.EXTERNAL_ENGINES)}
    assert {f"`{name}`" for name in known} <= listed
    for name in known:
        assert training.load_engine(name).methods


def test_the_reward_of_the_readme_is_found_by_its_name(packages: Path) -> None:
    (code,) = [block for block in blocks("python") if "def short" in block]
    (entry_points,) = blocks("toml")
    (packages / "their_package").mkdir()
    (packages / "their_package" / "rewards.py").write_text(code)
    match = re.fullmatch(r'\[project\.entry-points\."(.*)"\]\n(\w+) = "(.*)"\n', entry_points)
    assert match is not None
    install(packages, "their-package", f"[{match[1]}]\n{match[2]} = {match[3]}\n")

    def config_with(*names: str) -> Any:
        return parse_config({"model": {"name_or_path": "x"}, "data": {"path": "y"}, "train": {"rewards": list(names)}})

    assert config_with("short", "builtin:format").train.rewards == ["short", "builtin:format"]
    found = rewards.load_rewards(["short"], [{"question": "1 + 2"}], "answer")
    assert rewards.checked("short", found["short"])(["1 + 2"], ["3"], question=["1 + 2"]) == [0.5]
    row = {"rewards": ["short"], "answer_field": "answer", "prompt": "1 + 2", "row": json.dumps({"question": "1 + 2"})}
    assert rewards.compute_score("", "3", "3", row) == 0.5
    with pytest.raises(ConfigError, match="'shorter' is neither builtin:number, builtin:format, short nor module:func"):
        config_with("shorter")
    with pytest.raises(ConfigError, match="a reward 'short' is in the list already"):
        config_with("short", "their_package.rewards:short")
