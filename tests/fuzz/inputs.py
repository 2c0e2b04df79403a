"""Cases of damaged files and arguments: a finished run with one thing wrong, and the commands that read it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from plop_dist.config.schema import Config
from plop_dist.registry import EXPORTERS, names
from plop_dist.values.adapter_size import num_trainable_parameters
from plop_dist.values.scores import Projection
from tests.fuzz.mutations import NUMBERS, TEXTS, json_text, mutated, mutated_text, odd_value

ENGINES = ("fsdp", "dtensor", "megatron", "automodel", "x", "")
POLICIES = ("lowest_k", "highest_k", "budget", "threshold", "attention", "mlp", "all")


@dataclass(frozen=True)
class Case:
    """The commands that read what was damaged, one after the other."""

    commands: tuple[tuple[str, ...], ...]


def scores_case(run: Path, rng: Random) -> Case:
    """Damage scores.json, at times so that it still agrees with itself, and read it with every command that does."""
    if rng.random() < 0.8:
        (run / "samples.safetensors").unlink()
    _damage_json(run / "scores.json", rng, _other_scores if rng.random() < 0.6 else None)
    commands = [("place", str(run), *_place_overrides(rng), *rng.choice(((), (), ("--explain",), ("--sweep",))))]
    commands += [_export(run, rng) for _ in range(3)]
    if rng.random() < 0.3:
        commands.append(("report", str(run)))
    if rng.random() < 0.5:
        commands.append(("diff", str(run), str(run / "adapter_config.json")))
    return Case(tuple(commands))


def placement_case(run: Path, rng: Random) -> Case:
    """Damage placement.json, at times so that it still agrees with itself, and export, compare and report it."""
    scores = json.loads((run / "scores.json").read_text())
    other = (lambda tree, rng: _other_placement(tree, scores, rng)) if rng.random() < 0.6 else None
    _damage_json(run / "placement.json", rng, other)
    commands = [_export(run, rng) for _ in range(4)]
    if rng.random() < 0.2:
        commands.append(("report", str(run)))
    if rng.random() < 0.5:
        commands.append(("diff", str(run), str(run / "adapter_config.json")))
    return Case(tuple(commands))


def comparison_case(run: Path, rng: Random) -> Case:
    """Damage compare.json, and look at it."""
    _damage_json(run / "compare.json", rng, None)
    return Case((("report", str(run)),))


def adapter_case(run: Path, rng: Random) -> Case:
    """Damage an adapter configuration."""
    path = run / "adapter_config.json"
    if rng.random() < 0.5:  # one field at a time, so that the others do not hide it
        tree = json.loads(path.read_text())
        likely = mutated({"a": ["q_proj"], "b": {"v_proj": 4}}, rng)
        odd = rng.choice((odd_value(rng), likely, rng.choice(TEXTS), [rng.choice(TEXTS)]))
        tree[rng.choice((*_ADAPTER_FIELDS, *tree))] = odd
        path.write_bytes(json_text(tree))
    else:
        _damage_json(path, rng, None)
    return Case((("diff", str(run), str(path)),))


def config_case(run: Path, rng: Random) -> Case:
    """Damage a configuration, as a file of its own or as the one that the run directory keeps."""
    path = run.parent / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    if rng.random() < 0.5:
        tree = _with_key(tree, *rng.choice(_KEYS).split("."), value=odd_value(rng))
    else:
        tree = mutated(tree, rng)
    content = _yaml_text(tree, rng)
    if rng.random() < 0.3:
        content = rng.choice((mutated_text, _yaml_oddity))(content, rng)
    path.write_bytes(content)
    if rng.random() < 0.3:
        shutil.copy(path, run / "config.yaml")
        return Case((("place", str(run)), ("report", str(run))))
    return Case((("check", str(path)),))


def override_case(run: Path, rng: Random) -> Case:
    """Give odd overrides to a good configuration, and to a good run directory."""
    if rng.random() < 0.4:
        return Case((("place", str(run), *(_override(rng) for _ in range(rng.choice((1, 1, 2))))),))
    overrides = tuple(_override(rng) for _ in range(rng.choice((1, 1, 1, 3))))
    return Case((("check", str(run.parent / "config.yaml"), *overrides),))


def _damage_json(path: Path, rng: Random, other: Callable[[Any, Random], Any] | None) -> None:
    tree = json.loads(path.read_text())
    content = json_text((other or mutated)(tree, rng))
    path.write_bytes(mutated_text(content, rng) if rng.random() < 0.15 else content)


def _other_scores(tree: Any, rng: Random) -> Any:
    """Return scores of another model, or an odd one, that agree with themselves."""
    modules = tree["modules"]
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice(_SCORE_EDITS)(modules, rng)
    by_type: dict[str, list[float]] = {}
    for module in modules:
        module["nfn"] = module["gain"] / module["baseline"]
        by_type.setdefault(module["type"], []).append(module["nfn"])
    tree["types"] = [
        {"type": name, "num_modules": len(nfns), "nfn": sum(nfns) / len(nfns), "nfn_ci95": rng.choice((None, [0.1, 9]))}
        for name, nfns in by_type.items()
    ]
    for name in ("model", "data", "estimator", "parallel", "versions", "timing"):
        if rng.random() < 0.1:
            tree[name] = mutated(tree.get(name, {}), rng)
    return tree


def _other_gains(modules: Any, rng: Random) -> None:
    for module in modules:
        gain, baseline = rng.choice(((1e-300, 1.0), (1e300, 1.0), (1.0, 1e-300), (0.0, 1.0), (1.0, 1.0), (2.0, 1.0)))
        module.update(gain=gain, baseline=baseline)


def _other_sizes(modules: Any, rng: Random) -> None:
    size = rng.choice((1, 2, 7, 2**26, 2**31, 2**62, 10**30, 10**400))
    for module in rng.sample(modules, rng.randrange(1, len(modules) + 1)):
        module[rng.choice(("in_features", "out_features"))] = size


def _other_names(modules: Any, rng: Random) -> None:
    """Rename a type or a part of the paths, everywhere alike."""
    old = rng.choice(modules[0]["fqn"].split("."))
    new = rng.choice(TEXTS)
    for module in modules:
        for name in ("fqn", "type", "stored_in"):
            if module.get(name):
                module[name] = ".".join(new if part == old else part for part in module[name].split("."))


def _other_layers(modules: Any, rng: Random) -> None:
    for module in modules:
        module["layer"] = rng.choice((None, -1, 0, 10**9, 10**30))


def _other_storage(modules: Any, rng: Random) -> None:
    paths = [module["fqn"] for module in modules]
    for module in rng.sample(modules, rng.randrange(1, len(modules) + 1)):
        module["storage"] = rng.choice(("linear", "conv1d", "fused", "expert_parameter", "router"))
        module["stored_in"] = rng.choice((None, rng.choice(TEXTS), rng.choice(paths), module["fqn"] + ".weight"))


def _fewer(modules: Any, rng: Random) -> None:
    del modules[rng.randrange(1, len(modules) + 1) :]


def _more(modules: Any, rng: Random) -> None:
    modules += [
        {**module, "fqn": f"extra.{number}.{module['fqn']}"}
        for number in range(rng.choice((1, 50)))
        for module in modules
    ]


def _experts(modules: Any, rng: Random) -> None:
    for number, module in enumerate(modules):
        if rng.random() < 0.5:
            module["fqn"] = f"model.layers.{number}.mlp.experts.{rng.choice((0, number, 10**9))}.up_proj"
            module["type"] = rng.choice(("experts.up_proj", "up_proj"))


_SCORE_EDITS = (_other_gains, _other_sizes, _other_names, _other_layers, _other_storage, _fewer, _more, _experts)


def _other_placement(tree: Any, scores: Any, rng: Random) -> Any:
    """Return another placement, or an odd one, that agrees with itself and with the scores."""
    modules = scores["modules"]
    types = sorted({module["type"] for module in modules})
    wanted = set(rng.sample(types, rng.randrange(1, len(types) + 1)))
    chosen = [module for module in modules if module["type"] in wanted and (rng.random() < 0.7 or len(wanted) == 1)]
    chosen = chosen or modules[:1]
    tree["modules"] = [module["fqn"] for module in chosen]
    tree["module_types"] = list(dict.fromkeys(module["type"] for module in chosen))
    tree["rank"] = rng.choice((1, 3, 8, 2**20))
    tree["alpha"] = rng.choice((1e-300, 1, 8.5, 16, 9e8))
    names = [*tree["modules"], *tree["module_types"]]
    tree["rank_pattern"] = {name: rng.choice((1, 5, 2**20)) for name in rng.sample(names, rng.choice((0, 0, 1, 2)))}
    for name in ("policy", "diagnostics", "selection_confidence", "scores"):
        if rng.random() < 0.1:
            tree[name] = odd_value(rng)
    ranks = tree["rank_pattern"]
    tree["num_trainable_parameters"] = num_trainable_parameters(
        [Projection.model_validate(module) for module in chosen],
        lambda item: ranks.get(item.fqn, ranks.get(item.type, tree["rank"])),
        [Projection.model_validate(item) for item in scores.get("left_out", ())],
    )
    return tree


_ADAPTER_FIELDS = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "target_parameters", "rank_pattern", "alpha_pattern", "modules_to_save", "bias", "peft_type", "use_dora",
    "trainable_token_indices", "layer_replication", "fan_in_fan_out", "task_type",
)  # fmt: skip


def _export(run: Path, rng: Random) -> tuple[str, ...]:
    targets = (*names(EXPORTERS), "unknown") if rng.random() < 0.1 else names(EXPORTERS)
    command = ["export", str(run), "--to", rng.choice(targets)]
    if rng.random() < 0.3:
        command += ["--engine", rng.choice(ENGINES)]
    return (*command, *rng.choice(((), ("--widen",))))


def _place_overrides(rng: Random) -> tuple[str, ...]:
    return rng.choice(
        (
            (),
            (f"k={rng.choice((1, 2, 50))}",),
            (f"policy={rng.choice(POLICIES)}", "threshold=1.0", "max_trainable_parameters=1000"),
            (f"policy={rng.choice(POLICIES)}", "threshold=1.0", "max_trainable_parameters=1000", "fit=rank"),
            (f"granularity={rng.choice(('type', 'layer', 'module'))}", "exclude=[]"),
            ("experts=true", "exclude=[]"),
        )
    )


def _keys(section: Any, prefix: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        found += _keys(inner, f"{prefix}{name}.") if hasattr(inner, "model_fields") else [f"{prefix}{name}"]
    return found


_KEYS = _keys(Config)
_ODD_KEYS = (
    "model", "data.path.x", "placement.exclude.x", "placement.exclude.0", "export.targets.0.a", "a..b", ".", "a.", ".a",
    "[0]", "data[0]", "data[path]", "", " ", "k", "placement", "data.", "x" * 5000, ".".join("a" * 2000), "é", "${a}",
    "model.name_or_path.", "placement.rank_pattern.v_proj", "placement.rank_pattern.a.b", "@", "run_dir.x", "\udcff",
)  # fmt: skip
_ODD_TEXTS = (
    "", "null", "{", "[", "[[[", "{a: b", "{a: 1}", "[1, 2]", "[]", "{}", "!!python/object:os.system", "&a", "*a",
    "? a", "- a", "a: b: c", "2e-4", "1e400", "1_000", "0o17", "0x10", "2001-01-01", "1:30", "~", ".nan", "-.inf",
    ".inf", "yes", "'", '"', "!!binary abc", "!!set {a}", "<<: a", "[" * 3000, "{a: " * 400, "%", "|", ">", "#",
    "--- a", "a\nb", "\udcff", "=", "a=b", "${model}", "${", "${oc.env:PATH}", "???", "${x:y}",
)  # fmt: skip


def _override(rng: Random) -> str:
    key = rng.choice(_KEYS) if rng.random() < 0.7 else rng.choice(_ODD_KEYS)
    value = rng.choice((rng.choice(_ODD_TEXTS), str(rng.choice(NUMBERS[:-1])), rng.choice(TEXTS)))
    text = rng.choice((f"{key}={value}",) * 8 + (key, f"={value}", f"{key}=={value}"))
    # What no command line can hold: the system's calls take no zero byte, and decode others to U+DC80 to U+DCFF.
    return text.replace("\x00", "").replace("\ud800", "\udc80").replace("\udfff", "\udcfe")


def _with_key(tree: Any, *keys: str, value: Any) -> Any:
    section = tree
    for key in keys[:-1]:
        section = section.setdefault(key, {})
    section[keys[-1]] = value
    return tree


def _yaml_text(tree: Any, rng: Random) -> bytes:
    if rng.random() < 0.5:
        return json_text(tree)  # which is YAML too, lone surrogates and all
    try:
        return yaml.safe_dump(tree, allow_unicode=rng.random() < 0.5).encode()
    except (yaml.YAMLError, ValueError):  # an integer of more than 4,300 digits
        return json_text(tree)


def _yaml_oddity(content: bytes, rng: Random) -> bytes:
    laughs = b"a: &a [x, x]\n" + b"".join(
        b"%c: &%c [*%c, *%c, *%c, *%c, *%c, *%c, *%c, *%c]\n" % (c, c, *[c - 1] * 8) for c in range(ord("b"), ord("m"))
    )
    return rng.choice(
        (
            content + b"\n---\n" + content,
            b"%YAML 9.9\n---\n" + content,
            b"!!python/object/apply:os.getcwd []\n",
            content + b"\n!!python/name:os.system : x\n",
            content + b"\n? [a, b]\n: c\n",
            content + b"\n1: 2\nnull: 3\ntrue: 4\n2001-01-01: 5\n1.5: 6\n",
            content + b"\n<<: [1]\n",
            content + b"\nextra: &x {a: *x}\n",
            content + b"\nextra: *unknown\n",
            content.replace(b": ", b":\t", 3),
            content + b"\nextra: !!binary =\n",
            content + b"\nextra: !!timestamp x\n",
            content + b"\nextra: 2001-99-99\n",
            content + b"\nextra: !!int x\n",
            content + b"\nextra: 1" + b":59" * 3000 + b"\n",
            laughs,
            content + laughs,
        )
    )
