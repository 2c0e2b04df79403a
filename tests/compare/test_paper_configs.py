"""Every configuration of configs/paper is taken by `plop-dist check`, on rows with the columns of its data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plop_dist.compare.comparison import check
from plop_dist.config.loading import load_config
from tests.fuzz.commands import run_here
from tests.models import save_tiny

PAPER = Path(__file__).parents[2] / "configs" / "paper"
ROWS = {
    "gsm8k": {"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"},
    "anli": {"premise": "It rains.", "hypothesis": "It is dry.", "label": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of the same family."""
    return save_tiny("qwen3", tmp_path_factory.mktemp("model"))


def test_there_is_one_for_each_size_method_and_data_set() -> None:
    found = {path.stem for path in PAPER.glob("qwen3-*.yaml")}
    assert found == {
        f"qwen3-{size}-{kind}" for size in ("0.6b", "1.7b") for kind in ("sft-gsm8k", "sft-anli", "grpo-gsm8k")
    }
    page = (PAPER / "README.md").read_text()
    assert all(f"[{name}]({name}.yaml)" in page for name in found)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(PAPER.glob("*.yaml")), ids=lambda path: path.stem)
def test_check_takes_it(path: Path, model: Path, tmp_path: Path) -> None:
    config = load_config(path, [])
    if config.train.method != "none":
        check(config)
    overrides = [f"run_dir={tmp_path / 'run'}", f"model.name_or_path={model}", "placement.rank=4"]
    data = path.stem.rpartition("-")[2]
    if data in ROWS:
        (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(ROWS[data])] * 600))
        overrides += [f"data.path={tmp_path / 'rows.jsonl'}", "data.split=train"]
    outcome = run_here(("check", str(path), *overrides))
    assert outcome.status == 0, outcome
