"""A mistake is where it was made: the override that was typed, or the line of the file; in our own words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from plop_dist.config.loading import load_config, parse_config
from plop_dist.config.schema import Config
from plop_dist.errors import UserError

TEXT = """\
model: {name_or_path: some/model}
data:
  path: rows.jsonl
  # how many
  num_samples: 0
parallel:
  backend: transformers
  zero_stage: 3
plcement: {}
"""


def message(path: Path, text: str, *overrides: str) -> str:
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_every_line_of_a_file_that_is_wrong_is_named(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    assert message(file, TEXT).splitlines() == [
        f"{file}:5: data.num_samples: expected a number greater than or equal to 1, but the value is 0 (Calibration "
        "samples (rows).)",
        f"{file}:9: unknown key 'plcement'. Did you mean 'placement'? Available: "
        f"{', '.join(sorted(Config.model_fields))}.",
    ]
    fixed = TEXT.replace("num_samples: 0", "num_samples: 9").replace("plcement", "placement")
    assert message(file, fixed).startswith(f"{file}:8: parallel.zero_stage is 3, but parallel.backend 'transformers'")


def test_an_override_is_named_as_it_was_typed(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    good = "model: {name_or_path: m}\ndata: {path: d, num_samples: 3}\n"
    assert message(file, good, "data.num_samples=many").startswith(
        f"{file}: override 'data.num_samples=many': data.num_samples: expected a whole number, but the value is 'many'"
    )
    assert ": override 'parallel={dp: 2, ep: 2}': parallel.ep is 2" in message(file, good, "parallel={dp: 2, ep: 2}")
    both = message(file, f"{good}parallel: {{tp: 2}}\n", "parallel.backend=megatron", "cluster.num_workers=3")
    assert ": override 'cluster.num_workers=3': parallel.tp (2)" in both
    assert "override 'placement.lm=1': unknown key 'placement.lm'" in message(file, good, "placement.lm=1")
    secret = message(file, good, "data.path=https://me:hidden@h.example/d")
    assert "hidden" not in secret
    assert "override 'data.path=...'" in secret


@pytest.mark.parametrize(("short", "whole"), [("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")])
def test_short_names_of_dtypes_are_understood(short: str, whole: str) -> None:
    tree = {"model": {"name_or_path": "m", "dtype": short}, "data": {"path": "d"}}
    assert parse_config(tree).model.dtype == whole


VALUES = ["x", 0, -1, 1.5, True, None, [], ["x", 1], {}, {"x": "y"}, "", "a" * 3, 10**30, float("nan"), "a\0b"]


def test_no_message_has_another_library_s_words() -> None:
    """Whatever is put where: pydantic's sentences begin with `Input should`, its types are called string or dict."""
    foreign = re.compile(r"Input should|valid (integer|number|string|boolean|list|dictionary)|unable to parse|pydantic|"
                         r"expected another|\bstr\b|\bdict\b")  # fmt: skip
    texts = []
    for name, field in Config.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        for key in inner or [None]:
            for value in VALUES:
                base = {"model": {"name_or_path": "m"}, "data": {"path": "d"}}
                tree = {**base, name: value if key is None else {**base.get(name, {}), key: value}}
                try:
                    parse_config(tree)
                except UserError as error:
                    texts.append(str(error))
    assert len(texts) > 300
    assert [text for text in texts if foreign.search(text)] == []


def remedies(text: str) -> list[str]:
    """Return the `section.key=value` that a message tells to set or use."""
    value = r"(?:\[[^\]]*\]|\{[^}]*\}|[\w:.]*\w)"
    found = re.findall(rf"(?:set|use|or) (\w+\.\w+={value})", text)
    return [item for item in found if "..." not in item]


REFUSED = [
    "parallel.zero_stage=3",
    "parallel.tp=0",
    "parallel.sequence_parallel=true",
    "parallel.pp=2",
    "parallel.cp=2",
    "parallel={dp: 2, ep: 2}",
    "parallel.backend=torch",
    "placement={options: {share: 1}}",
]


@pytest.mark.parametrize("override", REFUSED)
def test_what_a_refused_configuration_offers_is_accepted(tmp_path: Path, override: str) -> None:
    file = tmp_path / "c.yaml"
    good = "model: {name_or_path: m}\ndata: {path: d}\n"
    offered = remedies(message(file, good, override).partition(": ")[2])
    for remedy in offered:
        load_config(file, [override, remedy])
    assert offered or override == "parallel.tp=0"
