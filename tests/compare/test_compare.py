"""A whole comparison: its trainings are plain PEFT's, in every layout; cut off, it goes on to the same file."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from plop_dist import ranks
from plop_dist.backends.hf.load import load_tokenizer
from plop_dist.compare.arms import build_arms
from plop_dist.compare.comparison import check, compare
from plop_dist.compare.result import Comparison
from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError, DataError
from plop_dist.launch.rank import run_rank
from plop_dist.rundir.stages import Stages
from plop_dist.training.data import TrainingData
from plop_dist.values.scores import Scores
from tests.installed import needs_bridge
from tests.models import save_tiny, tiny
from tests.spawn import run_ranks
from tests.training.cases import KilledError, assert_equal, reference

ARMS = ["lowest_k", "all", "mlp"]


def make_config(
    directory: Path,
    run: str,
    compare: dict[str, Any] | None = None,
    placement: dict[str, Any] | None = None,
    **parallel: Any,
) -> Config:
    """Return a comparison of three arms by four steps of four rows each, whatever the number of replicas."""
    if not (directory / "model").is_dir():
        save_tiny("llama", directory / "model")
    if not (directory / "rows.jsonl").is_file():
        rows = [{"question": f"{i} + {3 * i} = ", "answer": f"{4 * i}" * (1 + i % 3)} for i in range(40)]
        (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return parse_config(
        {
            "run_dir": str(directory / run),
            "model": {"name_or_path": str(directory / "model"), "dtype": "float32"},
            "data": {"path": str(directory / "rows.jsonl"), "template": "{question}{answer}", "num_samples": 4},
            "placement": {"k": 2, "rank": 4, "alpha": 8, **(placement or {})},
            "parallel": parallel,
            "train": {"method": "sft", "max_steps": 4, "learning_rate": 0.02, "seed": 5, "max_grad_norm": 0.3,
                      "micro_batch_size": 4 // parallel.get("dp", 1), "prompt_template": "{question}"},
            "compare": {"arms": ARMS, "rates": 1, "seeds": 2, "held_out": 12, **(compare or {})},
        }
    )  # fmt: skip


def quietly(kind: str, **fields: Any) -> None:
    """Take progress without showing it."""


def scored(config: Config) -> Config:
    """Score on this rank, and return the configuration."""
    run_rank(Stages(config), ["score"], quietly)
    ranks.barrier()
    return config


def values(found: Comparison) -> dict[tuple[str, float, int, int], tuple[float | None, float | None]]:
    """Return what every training ended with, by arm, rate, seed and steps."""
    return {
        (arm.arm, run.learning_rate, run.seed, run.steps): (run.value, run.choosing)
        for arm in found.arms
        for run in arm.runs
    }


def same(found: Comparison, expected: Comparison, tolerance: float = 1e-4) -> None:
    """Assert that two comparisons trained the same, to the same losses."""
    trained, wanted = values(found), values(expected)
    assert trained.keys() == wanted.keys()
    assert [arm.rank for arm in found.arms] == [arm.rank for arm in expected.arms]
    for key, pair in wanted.items():
        for value, one in zip(trained[key], pair, strict=True):
            assert (value is None) == (one is None), key  # further seeds choose nothing
            if one is not None:
                assert_equal(str(key), value, one, tolerance)
    assert found.base == pytest.approx(expected.base, rel=1e-5)


@pytest.mark.slow
def test_every_training_is_plain_peft_s_though_the_base_is_loaded_once(tmp_path: Path) -> None:
    config = scored(make_config(tmp_path, "run"))
    found = compare(config, quietly)
    assert [arm.arm for arm in found.arms] == ARMS
    assert [one.against for one in found.comparisons] == ARMS[1:]
    train = config.train.model_copy(update={"eval_samples": 12})
    arms = build_arms(Scores.from_file(config.run_path / "scores.json"), ARMS, config.placement, 0)
    for arm, candidate in zip(found.arms, arms, strict=True):
        assert [run.seed for run in arm.runs] == [5, 6]
        for run in arm.runs:
            one = config.model_copy(update={"train": train.model_copy(update={"seed": run.seed})})
            assert (run.choosing is None) == (run.seed == 6)  # at further seeds nothing is chosen
            for first, value in ((1, run.value), (0, run.choosing)):
                if value is not None:
                    data = TrainingData(one, load_tokenizer(config.model))
                    data.held_out = [{name: rows[first::2] for name, rows in batch.items()} for batch in data.held_out]
                    expected = reference(tiny("llama"), one, candidate.placement, data, per_step=1)
                    assert_equal(f"{arm.arm}, seed {run.seed}", value, expected["held_out_after"])
    assert found.cost.steps == 3 * 2 * 4
    assert all(arm.cost.tokens_per_second > 0 and arm.cost.peak_memory_bytes > 0 for arm in found.arms)


@pytest.mark.slow
@pytest.mark.parametrize("killed_after", [1, 9, 30])
def test_one_that_is_cut_off_goes_on_to_the_same_file(tmp_path: Path, killed_after: int) -> None:
    options = {"rates": 2, "arms": ["lowest_k", "all", "all_again.json"]}
    whole = scored(make_config(tmp_path, "whole", options))
    arms = build_arms(Scores.from_file(whole.run_path / "scores.json"), ["lowest_k", "all"], whole.placement, 0)
    options["arms"] = ["lowest_k", "all", str(whole.run_path / "placement.json")]
    arms[1].placement.to_file(whole.run_path / "placement.json")
    whole = make_config(tmp_path, "whole", options)
    expected = compare(whole, quietly)
    cut = scored(make_config(tmp_path, "cut", options))
    steps = []

    def dying(kind: str, **fields: Any) -> None:
        if kind == "training":
            steps.append(fields["note"])
            if len(steps) == killed_after:
                raise KilledError

    with pytest.raises(KilledError):
        compare(cut, dying)
    num_done = len(list((cut.run_path / "compare").glob("[!b]*.json")))
    before, steps[:] = len(steps), [None] * 10**6
    found = compare(cut, dying)
    again = len(steps) - 10**6
    assert found.cost.steps == expected.cost.steps
    assert again + before - expected.cost.steps < 4  # one training is lost at most
    assert num_done <= before // 2
    measured = {"arms": {"__all__": {"cost"}}, "cost": True}
    assert found.model_dump(exclude=measured) == expected.model_dump(exclude=measured)
    first, second, third = found.arms
    assert second.runs == third.runs  # the same placement is trained once
    assert first.runs != second.runs


def _sharded(
    rank: int, directory: str, run: str, parallel: dict[str, Any], placement: dict[str, Any]
) -> dict[str, Any]:
    config = scored(make_config(Path(directory), run, placement=placement, **parallel))
    return compare(config, quietly).model_dump(mode="json", by_alias=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param({"backend": "megatron", "tp": 2}, marks=needs_bridge),
        pytest.param({"backend": "megatron", "pp": 2}, marks=[needs_bridge, pytest.mark.rare]),
        {"backend": "deepspeed", "dp": 2, "zero_stage": 2},
        {"backend": "deepspeed", "dp": 2, "zero_stage": 3},
        pytest.param({"backend": "deepspeed", "dp": 2, "zero_stage": 1}, marks=pytest.mark.rare),
        {"backend": "transformers", "dp": 2},
        pytest.param({"backend": "transformers", "tp": 2}, marks=pytest.mark.rare),
        pytest.param({"backend": "deepspeed", "tp": 2}, marks=pytest.mark.rare),
        pytest.param({"backend": "deepspeed", "pp": 2}, marks=pytest.mark.rare),
    ],
    ids=lambda parallel: "-".join(map(str, parallel.values())),
)
def test_sharded_arms_have_the_values_of_one_process(tmp_path: Path, parallel: dict[str, Any]) -> None:
    check_sharded(tmp_path, parallel, {})


@pytest.mark.slow
@pytest.mark.rare
@needs_bridge
def test_over_three_ranks_every_rank_is_a_multiple_of_three(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    found = check_sharded(tmp_path, {"backend": "megatron", "tp": 3}, {"k": 5, "rank": 12})
    assert [arm.rank for arm in found.arms if arm.arm == "all"] == [12]
    assert {arm.rank % 3 for arm in found.arms} == {0}


def check_sharded(directory: Path, parallel: dict[str, Any], placement: dict[str, Any]) -> Comparison:
    """Assert that a layout trains all arms as one process does, and return that one's comparison."""
    one = scored(make_config(directory, "one", placement=placement))
    num_ranks = math.prod(parallel.get(axis, 1) for axis in ("tp", "pp", "dp"))
    every = run_ranks(num_ranks, _sharded, str(directory), "sharded", parallel, placement)
    for name in ("scores.json", "samples.safetensors"):  # of the same ranks, which Megatron has as multiples of tp
        (one.run_path / name).write_bytes((directory / "sharded" / name).read_bytes())
    expected = compare(one, quietly)
    for found in every:
        same(Comparison.model_validate(found), expected)
    return expected


@pytest.mark.slow
def test_a_command_that_was_killed_ends_with_the_same_file_when_it_is_run_again(tmp_path: Path) -> None:
    options = {"rates": 2, "seeds": 3}
    expected = compare(scored(make_config(tmp_path, "whole", options)), quietly)
    config = make_config(tmp_path, "killed", options)
    (tmp_path / "config.yaml").write_text(config.stored_yaml())
    command = [sys.executable, "-m", "plop_dist.cli", "compare", str(tmp_path / "config.yaml")]
    done = config.run_path / "compare"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 200
        while len(list(done.glob("[!b]*.json"))) < 3 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in done.glob("[!b]*.json")}
    num_trainings = sum(len(arm.runs) for arm in expected.arms)
    assert 3 <= len(before) < num_trainings
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "those that are done already are kept" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before  # not one of them was trained again
    found = Comparison.from_file(config.run_path / "compare.json")
    measured = {"arms": {"__all__": {"cost"}}, "cost": {"seconds"}}
    assert found.model_dump(exclude=measured) == expected.model_dump(exclude=measured)


@pytest.mark.slow
def test_the_command_prints_a_table_and_a_sentence_and_keeps_what_is_done(tmp_path: Path) -> None:
    config = make_config(tmp_path, "run")
    (tmp_path / "config.yaml").write_text(config.stored_yaml())
    command = [sys.executable, "-m", "plop_dist.cli", "compare", str(tmp_path / "config.yaml")]
    first = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    assert "3 arms, 6 trainings of 4 steps" in first.stderr
    lines = first.stdout.splitlines()
    assert max(map(len, lines[:6])) <= 80
    assert [line.split()[0] for line in lines[2:5]] == ARMS
    assert any(line.startswith("lowest_k ") and "rows, base" in line for line in lines)
    page = (config.run_path / "report.html").read_text()
    assert "Does the placement pay?" in page
    before = (config.run_path / "compare.json").read_bytes()
    second = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    assert second.stdout == first.stdout
    assert "compare: done before, kept" in second.stderr
    assert (config.run_path / "compare.json").read_bytes() == before
    # Damaged, it is refused with what mends it, and that does; so does a damaged training, which alone is done again.
    (config.run_path / "compare.json").write_bytes(before[:-9])
    damaged = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert damaged.returncode == 2
    assert "remove it where it is damaged, and run plop-dist compare" in damaged.stderr
    assert "Traceback" not in damaged.stderr
    (config.run_path / "compare.json").unlink()
    next((config.run_path / "compare").glob("[!b]*.json")).write_text("{")
    mended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert mended.returncode == 0, mended.stderr
    again = json.loads((config.run_path / "compare.json").read_bytes())
    assert values(Comparison.model_validate(again)) == values(Comparison.model_validate_json(before))
    assert [one["verdict"] for one in again["comparisons"]] == [
        one["verdict"] for one in json.loads(before)["comparisons"]
    ]


def test_a_configuration_that_trains_nothing_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, "run")
    train = config.train.model_copy(update={"method": "none"})
    with pytest.raises(ConfigError, match=r"train.method is none, which trains nothing; set train.method=sft or grpo"):
        check(config.model_copy(update={"train": train}))


@pytest.mark.slow
def test_too_few_held_out_rows_are_refused_by_the_key_that_asks_for_them(tmp_path: Path) -> None:
    config = scored(make_config(tmp_path, "run", {"held_out": 40}))
    with pytest.raises(DataError, match=r"has 40 rows, but compare.held_out holds out 40"):
        compare(config, quietly)
