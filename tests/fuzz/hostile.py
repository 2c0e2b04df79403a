"""Cases of run directories from somebody who means harm: in any file commands, secrets, escapes, patterns and links.

What is drawn here is well-formed where that gets it further: a type or a module is renamed everywhere alike, numbers
still agree with each other, a pickle is a whole checkpoint with a trap beside it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml
from safetensors.numpy import load_file, save_file

from plop_dist.registry import EXPORTERS, names
from tests import payloads

TOKEN = "xmarkx"  # stands in every text that a browser could take for more than text
ENV_SECRET = "PLOP_DIST_TEST_SECRET"
CATASTROPHIC = (
    "(([a-z_.0-9]+)+)+!",
    "(a|a|[a-z._0-9]+)*!",
    "(.*.*.*.*.*.*.*.*.*)*!",
    "((.+)+)+\\d{9}",
    "*a*" * 40 + "!",
)


@dataclass(frozen=True)
class Trap:
    """What a case is made with: where a command that ran would leave its mark, and what lies outside of the run.

    outside: a folder of the victim's with a secret in its files, which nothing may change or copy.
    """

    marker: Path
    outside: Path
    secret: str


def texts(trap: Trap) -> tuple[str, ...]:
    """Return texts that would do something: run a command, give a secret away, or speak to a terminal or a browser."""
    make = f"mkdir {trap.marker}"
    python = f"__import__('os').system('{make}')"
    return (
        f"$({make})", f"`{make}`", f"'; {make}; '", f'"; {make}; "', f"x\n{make}\n", f"| {make}", f"& {make} &",
        python, f'" + {python} + "', f"{{{{ cycler.__init__.__globals__.os.system('{make}') }}}}",
        f"{{% set x = lipsum.__globals__.os.popen('{make}') %}}", f"%({make})s", f"{{0.__globals__[os]}} {make}",
        f'!!python/object/apply:os.system ["{make}"]', f"!!python/object/new:os.system [{make}]",
        f"${{oc.env:{ENV_SECRET}}}", f"${{oc.decode:${{oc.env:{ENV_SECRET}}}}}", f"${{env:{ENV_SECRET}}}",
        f"a${{oc.env:{ENV_SECRET}}}b", f"${ENV_SECRET}", f"${{{ENV_SECRET}}}", "${model}", "${run_dir}", "${",
        f"</script><script>{TOKEN}()</script>", f"<img src=x onerror={TOKEN}()>", f'"><svg onload={TOKEN}()>',
        f"' onmouseover='{TOKEN}()", f"javascript:{TOKEN}()", f"<a href='javascript:{TOKEN}()'>x</a>", "<!--", "]]>",
        f"</style></title></textarea><iframe srcdoc='<script>{TOKEN}()</script>'>",
        "\x1b]52;c;eA==\x07", "\x1b]0;x\x07", "\x1b]8;;http://x\x1b\\x\x1b]8;;\x1b\\", "\x1b[2J", "\x9b2J",
        "\x9d0;x\x9c", "a\rb", "\x08\x08", "\x7f", "\u202ex\u202c", "\u2066x", "\u2028", "\u200b", "\x00",
        "a\tb", "a\nb", "[link=http://x]y[/link]", "[red]x", "[/]", "[bold]", "\\[x]",
        f"../../{trap.outside.name}/key", f"{trap.outside}/key", "/dev/zero", "/dev/tty", "~root", "file:///etc/passwd",
        f"{trap.outside}", "..", "/", ".", "-x", "--help", "*", "",
        *CATASTROPHIC,
    )  # fmt: skip


def make_hostile(run: Path, rng: Random, trap: Trap) -> list[str]:
    """Change one to three files of a run directory; returns what was done, for the one who looks at a finding."""
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        files = sorted(path for path in run.rglob("*") if path.is_file() and not path.is_symlink())
        if rng.random() < 0.6:
            files = [path for path in files if path.parent in (run, run / "train")] or files
        path = rng.choice(files)
        by_kind = next(edit for ending, edit in _BY_ENDING.items() if path.name.endswith(ending))
        content = _OWN.get(path.name, by_kind) if rng.random() < 0.6 else by_kind
        edit = rng.choice((content,) * 5 + (_linked, _odd_file, _neighbour))
        with suppress(Exception):  # an earlier edit of the same file has left nothing that this one could begin with
            done.append(f"{path.relative_to(run)}: {edit.__name__}: {edit(path, rng, trap)!r:.160}")
    return done


def commands_for(run: Path, rng: Random) -> list[tuple[str, ...]]:
    """Return commands that look at the run directory, and at times those that go on with it."""
    adapters = sorted(run.rglob("adapter_config.json"))
    looks = [
        ("place", str(run), *rng.choice(((), ("--explain",), ("--sweep",), ("k=1",)))),
        *(("export", str(run), "--to", target) for target in names(EXPORTERS)),
        ("report", str(run)),
        *(("diff", str(run), str(path)) for path in adapters[:2]),
        ("check", str(run / "config.yaml")),
        ("targets", str(run)),
    ]
    commands = rng.sample(looks, rng.choice((6, 12)))
    goes_on = rng.random()
    if goes_on < 0.4:
        name = "score" if goes_on < 0.1 else "run"
        commands.append((name, str(run / "config.yaml"), f"run_dir={run}"))
    if goes_on < 0.3:
        _forget_the_end(run)
    return [*commands, ("report", str(run))]


def _forget_the_end(run: Path) -> None:
    """Take away what says that training is done, so that it resumes from the first checkpoint."""
    for path in (run / "train" / "summary.json", run / "stages.json"):
        if path.is_file():
            path.unlink()
    shutil.rmtree(run / "train" / "checkpoints" / "checkpoint-2", ignore_errors=True)


def _json_texts(path: Path, rng: Random, trap: Trap) -> Any:
    """Put texts in place of some values, or of keys."""
    tree = json.loads(path.read_text())
    done = _plant(tree, rng, trap)
    path.write_text(json.dumps(tree))
    return done


def _json_lines(path: Path, rng: Random, trap: Trap) -> Any:
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    entry = json.loads(lines[at])
    done = _plant(entry, rng, trap)
    lines[at] = json.dumps(entry)
    lines.insert(at, rng.choice((lines[at], rng.choice(texts(trap)), json.dumps(rng.choice(texts(trap))))))
    path.write_text("\n".join(lines) + "\n")
    return done


def _plant(tree: Any, rng: Random, trap: Trap) -> Any:
    done = []
    for _ in range(rng.choice((1, 1, 2, 5))):
        places = list(_places(tree))
        if not places:
            break
        leaves = [place for place in places if isinstance(place[0][place[1]], str)]
        parent, key = rng.choice(leaves if leaves and rng.random() < 0.7 else places)
        text = rng.choice(texts(trap))
        done.append((key, text))
        if isinstance(parent, dict) and rng.random() < 0.2:
            parent[text] = parent.pop(key)
        elif isinstance(parent[key], list) and rng.random() < 0.5:
            parent[key].append(text)
        else:
            parent[key] = rng.choice((text, text, text, [text], {text: text}, {"a": {text: 1}}))
    return done


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


def _renamed(path: Path, rng: Random, trap: Trap) -> Any:
    """Rename a component of the modules' paths in all files of scores and placement alike."""
    run = path.parent
    if (run / "scores.json").is_symlink() or not (run / "scores.json").is_file():
        return None
    scores = json.loads((run / "scores.json").read_text())
    old = rng.choice(rng.choice(scores["modules"])["fqn"].split("."))
    new = rng.choice(texts(trap)).replace(".", "_")

    def other(value: Any) -> Any:
        if isinstance(value, dict):
            return {other(key): other(item) for key, item in value.items()}
        if isinstance(value, list):
            return [other(item) for item in value]
        if isinstance(value, str) and value != run:
            return ".".join(new if part == old else part for part in value.split("."))
        return value

    for name in ("scores.json", "placement.json"):
        if (run / name).is_file():
            (run / name).write_text(json.dumps(other(json.loads((run / name).read_text()))))
    if (run / "samples.safetensors").is_file():
        _rename_samples(run / "samples.safetensors", other)
    return old, new


def _rename_samples(path: Path, other: Callable[[Any], Any]) -> None:
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        metadata = dict(file.metadata())
    metadata["fqns"] = json.dumps(other(json.loads(metadata["fqns"])))
    save_file(load_file(path), path, metadata)


def _policy(path: Path, rng: Random, trap: Trap) -> Any:
    """Put patterns and texts where a configuration's section on the placement is read."""
    tree = yaml.safe_load(path.read_text())
    section = tree["placement"]
    key = rng.choice(("exclude", "include", "rank_pattern", "options", "policy"))
    text = rng.choice((*CATASTROPHIC, rng.choice(texts(trap))))
    section[key] = {"rank_pattern": {text: 4}, "options": {text: text}, "policy": text}.get(key, [text])
    path.write_text(yaml.safe_dump(tree))
    return key, text


def _adapters(path: Path, rng: Random, trap: Trap) -> Any:
    """Put a pattern where PEFT matches one."""
    tree = json.loads(path.read_text())
    key = rng.choice(("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "rank_pattern",
                      "alpha_pattern", "target_parameters", "trainable_token_indices", "auto_mapping",
                      "base_model_name_or_path", "revision", "peft_type", "task_type"))  # fmt: skip
    text = rng.choice((*CATASTROPHIC, rng.choice(texts(trap))))
    if key == "layers_pattern":
        tree["layers_to_transform"] = [0]
    tree[key] = {text: 4} if key.endswith("_pattern") and key[0] in "ra" else rng.choice((text, [text]))
    if key == "auto_mapping":
        tree[key] = {"base_model_class": text, "parent_library": rng.choice(("os", text))}
    path.write_text(json.dumps(tree))
    return key, text


def _forged(path: Path, rng: Random, trap: Trap) -> Any:
    """Have the training's summary name a job that is yet to be started, and another stage one that must run."""
    script = path.with_name("launch.sh")
    script.write_text(f"mkdir {trap.marker}\n")
    job = {"script": str(script), "directory": str(path.parent)}
    path.write_text(json.dumps({**json.loads(path.read_text()), "job": job}))
    shutil.rmtree(path.parent.parent / "exports")
    return job


def _yaml_texts(path: Path, rng: Random, trap: Trap) -> Any:
    tree = yaml.safe_load(path.read_text())
    if rng.random() < 0.25:
        line = rng.choice((f'x: !!python/object/apply:os.system ["mkdir {trap.marker}"]', "x: !!python/name:os.system",
                           f"x: ${{oc.env:{ENV_SECRET}}}", f"run_dir: ${{oc.env:{ENV_SECRET}}}"))  # fmt: skip
        path.write_text(path.read_text() + f"\n{line}\n")
        return line
    done = _plant(tree, rng, trap)
    path.write_text(yaml.safe_dump(tree))
    return done


def _text_lines(path: Path, rng: Random, trap: Trap) -> Any:
    text = rng.choice(texts(trap))
    before, added = path.read_bytes(), text.encode()
    path.write_bytes(rng.choice((added, before + added, added + b"\n" + before)))
    return text


def _metadata(path: Path, rng: Random, trap: Trap) -> Any:
    """Put a text into the header of a safetensors file, as a value of its metadata or as a tensor's name."""
    arrays, text = load_file(path), rng.choice(texts(trap))
    if rng.random() < 0.5:
        arrays[text] = arrays.pop(rng.choice(sorted(arrays)))
        save_file(arrays, path)
    else:
        save_file(arrays, path, {rng.choice(("fqns", "format", text)): rng.choice((text, json.dumps([text])))})
    return text


def _poisoned(path: Path, rng: Random, trap: Trap) -> Any:
    """Put a trap beside what a pickle holds, or in its place."""
    kind = rng.choice(("poison", "alone", "old", *payloads.DISGUISES))
    if kind == "poison":
        payloads.poison(path, trap.marker)
    elif isinstance(kind, str):
        payloads.torch_file(path, trap.marker, is_zip=kind == "alone")
    else:
        path.write_bytes(payloads.call(*kind, str(trap.marker)))
    return kind


def _linked(path: Path, rng: Random, trap: Trap) -> Any:
    """Put a link in the place of the file, or of a folder above it: to the victim's own, to a device, to itself."""
    run = trap.marker.parent / "run"
    above = [folder for folder in path.parents if folder != run and folder.is_relative_to(run)]
    place = rng.choice([path, path, *above])
    targets = ["key", "yaml", "json", "log"] if place == path else ["."]
    target = rng.choice(
        (*(str(trap.outside / name) for name in targets), place.name, "/dev/zero", "/dev/full", "absent")
    )
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.symlink_to(target)
    return target


def _odd_file(path: Path, rng: Random, trap: Trap) -> Any:
    """Put what is no plain file in its place."""
    kind = rng.choice(("pipe", "folder", "empty", "large"))
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"" if kind == "empty" else b"[" * 300_000)
    return kind


_NEIGHBOURS = (
    "json.py", "torch.py", "plop_dist.py", "sitecustomize.py", "conftest.py", "rewards.py", "modeling.py",
    "scheduler.pt", "pytorch_model.bin", "adapter_model.bin", "training_args.bin", "scaler.pt", "rng_state_0.pth",
    "mp_rank_00_model_states.pt",
)  # fmt: skip


def _neighbour(path: Path, rng: Random, trap: Trap) -> Any:
    """Put a file beside it that a loader may look for: Python modules, pickles, settings."""
    name = rng.choice(_NEIGHBOURS)
    if name.endswith(".py"):
        payloads.module(path.with_name(name), trap.marker)
    else:
        payloads.torch_file(path.with_name(name), trap.marker)
    return name


_Edit = Callable[[Path, Random, Trap], Any]
_OWN: dict[str, _Edit] = {
    "scores.json": _renamed,
    "placement.json": _renamed,
    "config.yaml": _policy,
    "adapter_config.json": _adapters,
    "summary.json": _forged,
}
# The first ending that fits; the last fits all.
_BY_ENDING: dict[str, _Edit] = {
    ".json": _json_texts,
    ".jsonl": _json_lines,
    ".yaml": _yaml_texts,
    ".safetensors": _metadata,
    ".pt": _poisoned,
    ".pth": _poisoned,
    ".bin": _poisoned,
    "": _text_lines,
}
