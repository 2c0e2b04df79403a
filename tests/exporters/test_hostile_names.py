"""Names out of somebody else's scores.json reach every target as they are, through its flags and its files."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from plop_dist.errors import ExportError
from plop_dist.exporters.exporter import find_exporter
from plop_dist.exporters.suffixes import matcher
from plop_dist.exporters.text import hydra_overrides, hydra_yaml, one_line, python_list, shell_flags, yaml_text
from plop_dist.values.placement import Export, Placement
from tests.exporters.cases import llama_projections, place, projection, scores_of
from tests.exporters.hostile import NAMES, arguments


def placement_of(name: str) -> Placement:
    hostile = [projection(f"model.layers.{layer}.self_attn.{name}", 32, 32) for layer in range(2)]
    scores = scores_of([*llama_projections(), *hostile], name=f"/models/{name}")
    return place(scores, ["o_proj", name])


def hydra_list(override: str) -> list[str]:
    """Return the strings of `name=[...]`, in which a backslash stands for itself except before a quote."""
    _, _, value = override.partition("=")
    assert value[0] + value[-1] == "[]", override
    found = re.findall(r'"((?:\\+"|[^"])*?(?<!\\)(?:\\\\)*)"|([\w.]+)', value[1:-1])
    texts = [
        re.sub(r'(\\+)("|\Z)', lambda run: "\\" * (len(run[1]) // 2) + run[2], quoted) if quoted else bare
        for quoted, bare in found
    ]
    return OmegaConf.to_container(OmegaConf.create({"names": texts}), resolve=True)["names"]  # type: ignore[index]


def from_flags(target: str, export: Export, directory: Path) -> list[str]:
    """Return the names in the flags, as the target's command line gets them from a shell."""
    if target in ("peft", "deepspeed"):
        call = ast.parse(export.flags[0], mode="eval").body
        assert isinstance(call, ast.Call)
        return next(
            ast.literal_eval(item.value) for item in call.keywords if item.arg in ("target_modules", "target_mods")
        )
    if target == "axolotl":
        return yaml.safe_load("\n".join(export.flags))["lora_target_modules"]
    (words,) = arguments([export.flags], directory)
    if target == "skyrl":
        return names_of(OmegaConf.from_cli(words))
    if target in ("verl", "nemo-rl"):
        return hydra_list(next(word for word in words if ".target_modules=" in word))
    if target == "llamafactory":
        tree: Any = OmegaConf.to_container(OmegaConf.from_cli(words))
        return tree["lora_target"].split(",")
    start = next(index for index, word in enumerate(words) if word.endswith("target_modules"))
    return words[start + 1 :]


def from_file(target: str, export: Export, directory: Path) -> list[str]:
    """Return the names in the file, as the target reads it."""
    ((name, text),) = export.files.items()
    if target in ("peft", "deepspeed"):
        tree = json.loads(text)
        return tree.get("target_modules") or tree["target_mods"]
    if target in ("verl", "nemo-rl", "skyrl"):
        (directory / name).write_text(text)
        return names_of(OmegaConf.load(directory / name))
    if target == "openrlhf":
        return shlex.split(text)[shlex.split(text).index("--ds.lora.target_modules") + 1 :]
    tree = yaml.safe_load(text)
    names = next(
        value for key, value in tree.items() if key in ("target_modules", "lora_target", "lora_target_modules")
    )
    return names.split(",") if isinstance(names, str) else names


def names_of(tree: Any) -> list[str]:
    return next(value for key, value in flat(OmegaConf.to_container(tree, resolve=True)) if key == "target_modules")


def flat(tree: Any) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value)
        else:
            yield key, value


def is_refused(target: str, name: str) -> bool:
    if target in ("trl", "openrlhf", "ms-swift"):
        return name.startswith("-")
    return target == "llamafactory" and ("," in name or name != name.strip() or "${" in name)


@pytest.mark.parametrize(
    "target",
    ["peft", "trl", "openrlhf", "ms-swift", "llamafactory", "axolotl", "skyrl", "verl", "nemo-rl", "deepspeed"],
)
def test_every_name_arrives_as_it_is(target: str, tmp_path: Path):
    exporter = find_exporter(target)
    for name in NAMES:
        placement = placement_of(name)
        if is_refused(target, name):
            with pytest.raises(ExportError, match="Nearest choice: choose without it"):
                exporter.export(placement)
            continue
        export = exporter.export(placement)
        found = from_flags(target, export, tmp_path)
        assert found == from_file(target, export, tmp_path), name
        paths = [module.fqn for module in placement.source.modules]
        if target == "nemo-rl":  # patterns, in which `*` is any text and the rest a regular expression
            patterns = [re.compile("^" + pattern.replace("*", "(.*)") + "$", re.DOTALL) for pattern in found]
            hit = {path for path in paths if any(pattern.match(path) for pattern in patterns)}
        elif target == "deepspeed":
            hit = {path for path in paths if any(text in f"{path}." for text in found)}
        else:
            assert name in found
            hit = set(filter(matcher(found), paths))
        assert hit == set(placement.modules), name


def test_a_models_path_and_one_name_alone_arrive_as_they_are():
    for name in NAMES:
        placement = placement_of(name)
        tree = json.loads(find_exporter("peft").export(placement).files["adapter_config.json"])
        assert tree["base_model_name_or_path"] == f"/models/{name}"
        if is_refused("trl", name):
            continue
        alone = place(placement.source, [name])
        ((_, text),) = find_exporter("trl").export(alone).files.items()
        (pattern,) = yaml.safe_load(text)["lora_target_modules"]
        paths = [module.fqn for module in placement.source.modules]
        assert [path for path in paths if re.fullmatch(pattern, path, re.DOTALL)] == list(alone.modules)


def test_every_language_gives_a_text_back(tmp_path: Path):
    """Also where no type's name comes today: single values, keys of a mapping, Python files."""
    for name in NAMES:
        tree = {"path": name, "ranks": {name: 3}}
        assert yaml.safe_load(yaml_text(tree)) == tree
        assert ast.literal_eval(python_list([name, "q_proj"])) == [name, "q_proj"]
        fields = {"names": [name], "path": name}
        (words,) = arguments([[*shell_flags({"run": name}), *hydra_overrides(fields)]], tmp_path)
        assert words[:2] == ["--run", name]
        assert hydra_list(words[2]) == hydra_list(f"path=[{words[3].removeprefix('path=')}]") == [name]
        (tmp_path / "tree.yaml").write_text(hydra_yaml({"a.path": name}))
        assert OmegaConf.to_container(OmegaConf.load(tmp_path / "tree.yaml"), resolve=True) == {"a": {"path": name}}
        assert len(one_line(name).splitlines()) == 1
    assert one_line("exports/peft") == "exports/peft"
