"""GRPO: rewards, prompts, two ranks at ZeRO-2 where only the chosen modules learn, what other engines are handed."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config
from plop_dist.data.builtin import arithmetic_rows
from plop_dist.data.rows import load_rows
from plop_dist.data.texts import token_ids
from plop_dist.errors import ConfigError, DataError
from plop_dist.launch.rank import run_rank
from plop_dist.rundir.stages import Stages
from plop_dist.training import rewards
from plop_dist.training.data import RowSet, prompts_of, split_rows
from plop_dist.training.train import train as run_training
from plop_dist.values.placement import Placement
from tests.models import save_tiny, tiny, tiny_tokenizer
from tests.spawn import run_ranks
from tests.training.cases import load_placement, make_placement

ROWS = [{"question": "2 + 3?", "answer": "2 + 3 = 5. The answer is 5.", "number": "5"}]


def variety(prompts: list[str], completions: list[str], number: list[str], **columns: Any) -> list[float]:
    """A user's reward: how many different characters a completion has; the rows' columns come along."""
    assert len(prompts) == len(completions) == len(number)
    assert all(prompt and value.lstrip("-").isdigit() for prompt, value in zip(prompts, number, strict=True))
    return [float(len(set(completion))) for completion in completions]


def repeats(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [-float(prompt in completion) for prompt, completion in zip(prompts, completions, strict=True)]


def opens_a_chat(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    assert set(prompts) == {"<s>user: 2 + 3?\nassistant: "}
    return [float(len(completion)) for completion in completions]


def too_few(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [1.0]


def text_for_numbers(prompts: list[str], completions: list[str], **columns: Any) -> list[str]:
    return ["good"] * len(completions)


def narrow(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


def leave(completions: list[str], **columns: Any) -> list[float]:
    raise SystemExit(3)


def nothing(completions: list[str], **columns: Any) -> None:
    return None


def unrated(completions: list[str], **columns: Any) -> list[None]:
    return [None] * len(completions)


def make_config(directory: Path, *, train: dict[str, Any] | None = None, **parallel: Any) -> Config:
    options = {"method": "grpo", "max_steps": 3, "learning_rate": 0.01, "micro_batch_size": 4, "num_generations": 4,
               "max_completion_length": 6, "rewards": ["tests.training.test_grpo:variety", "builtin:number"],
               "answer_field": "number"}  # fmt: skip
    return parse_config(
        {
            "run_dir": str(directory / "run"),
            "model": {"name_or_path": str(directory / "model"), "dtype": "float32"},
            "data": {"path": "builtin:arithmetic", "num_samples": 4, "max_length": 32},
            "placement": {"k": 2, "rank": 4, "alpha": 8},
            "parallel": parallel,
            "train": {**options, **(train or {})},
        }
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7", 7), ("the change is 9 - 12 = -3.", -3), ("9-12", 12), ("$1,250.50 in all.", 1250.5), ("-$4", -4),
        ("1,2,3", 3), ("12,345 and 1,2345", 2345), ("no number", None), ("", None), ("#### 18", 18), ("x2.", 2),
        (".5", 0.5), ("-.25", -0.25), ("so \u22127", -7), ("1.2.3", 3), ("18.00", 18), ("5 apples, 6 pears", 6),
        ("7-5", 5),
    ],
)  # fmt: skip
def test_final_number(text: str, number: float | None) -> None:
    found = rewards.final_number(text)
    assert (None if found is None else float(found)) == number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 * 3 = 6. The answer is 6.", True), ("so\n#### 1,200\n", True), ("The answer is -4.  ", True),
        ("The answer is 6", False), ("The answer is 6. Or 7?", False), ("#### six", False), ("#### 6 apples", False),
        ("", False), ("The answer is .5.", True), ("#### $-4", True), ("The answer is 1,00.", False),
    ],
)  # fmt: skip
def test_final_form(text: str, expected: bool) -> None:
    assert rewards.has_final_form(text) is expected


def test_builtin_rewards_compare_with_the_rows_answers() -> None:
    by_name = rewards.load_rewards(["builtin:number", "builtin:format"], ROWS, "answer")
    completions = ["I say 5", "The answer is 6.", "The answer is 5.", "none"]
    columns = {"answer": [ROWS[0]["answer"]] * 4}
    assert by_name["number"](prompts=[""] * 4, completions=completions, **columns) == [1, 0, 1, 0]
    assert by_name["format"](prompts=[""] * 4, completions=completions, **columns) == [0, 1, 1, 0]
    rows = arithmetic_rows()
    own = rewards.load_rewards(["builtin:number", "builtin:format"], rows, "number")
    answers, numbers = [row["answer"] for row in rows], [row["number"] for row in rows]
    for reward in own.values():  # the reference answers themselves earn everything
        assert reward(prompts=answers, completions=answers, number=numbers) == [1.0] * len(rows)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["no_such_module:f"], "module 'no_such_module' cannot be imported (ModuleNotFoundError"),
        (["./rewards.py:f"], "name it as `import` does, not as a file, and install it, or put its directory on PYTHON"),
        (["tests.training.test_grpo:vareity"], "has no 'vareity'. Did you mean 'variety'?"),
        (["tests.training.test_grpo:ROWS"], "'tests.training.test_grpo:ROWS' is not a function"),
    ],
)
def test_a_reward_that_cannot_be_had_is_named(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        rewards.load_rewards(names, ROWS, "answer")


def test_a_reward_in_a_script_that_ends_the_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_script.py").write_text("import argparse\nargparse.ArgumentParser().parse_args(['--unknown'])\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"module 'a_script' cannot be imported \(SystemExit: 2\)"):
        rewards.load_rewards(["a_script:f"], ROWS, "answer")


def test_an_engine_that_rates_one_completion_tells_the_reward_its_prompt() -> None:
    info = {"rewards": ["tests.training.test_grpo:repeats"], "answer_field": "answer", "prompt": "2 + 3?",
            "row": json.dumps(ROWS[0])}  # fmt: skip
    assert [rewards.compute_score("", text, "", info) for text in ("2 + 3? 5", "5")] == [-1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", "'too_few' returned 1 values for 2 completions"),
        ("text_for_numbers", "'text_for_numbers' returned something that is not a number"),
        ("narrow", "'narrow' raised TypeError"),
        ("leave", "'leave' raised SystemExit: 3"),
        ("nothing", "'nothing' returned a NoneType, expected a list"),
    ],
)
def test_a_reward_that_misbehaves_is_named(name: str, message: str) -> None:
    reward = rewards.checked(name, rewards.load_rewards([f"tests.training.test_grpo:{name}"], ROWS, "answer")[name])
    with pytest.raises(ConfigError, match=re.escape(message)):
        reward(["a", "b"], ["c", "d"], answer=["1", "2"])


def test_rows_without_an_answer_are_named() -> None:
    with pytest.raises(DataError, match="row 1 has no column 'result'"):
        rewards.load_rewards(["builtin:number"], ROWS, "result")
    with pytest.raises(DataError, match=r"row 2: column 'answer' holds no number \('none'\)"):
        rewards.load_rewards(["builtin:number"], [*ROWS, {"answer": "none"}], "answer")


def test_prompts_are_the_template_the_text_or_the_open_chat(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert prompts_of(RowSet(ROWS, config.data), config.train, None) == ["2 + 3?"]
    config = make_config(tmp_path, train={"prompt_template": "Q: {question}\nA:"})
    assert prompts_of(RowSet(ROWS, config.data), config.train, None) == ["Q: 2 + 3?\nA:"]
    data = config.data.model_copy(update={"messages_field": "chat"})
    train = make_config(tmp_path).train
    chat = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]
    asked = "user: 2 + 3?\nassistant: "
    assert prompts_of(RowSet([{"chat": chat}], data), train, tiny_tokenizer()) == [asked]
    assert prompts_of(RowSet([{"chat": chat[:1]}], data), train, tiny_tokenizer()) == [asked]


def beginning_tokenizer() -> Any:
    """Return a tokenizer that puts a beginning of text before every text, as its chat template does, too."""
    tokenizer = tiny_tokenizer()
    begin = (str(tokenizer.bos_token), int(tokenizer.bos_token_id))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[begin])
    tokenizer.chat_template = "{{ bos_token }}" + str(tokenizer.chat_template)
    return tokenizer


@pytest.mark.slow
def test_trl_asks_a_chat_with_one_beginning_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trl

    save_tiny("llama", tmp_path / "model")
    tokenizer = beginning_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    row = {"chat": [{"role": "user", "content": "2 + 3?"}], "number": "5"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 40)
    config = make_config(tmp_path, train={"max_steps": 1, "rewards": ["tests.training.test_grpo:opens_a_chat"]})
    data = config.data.model_copy(update={"path": str(tmp_path / "rows.jsonl"), "messages_field": "chat"})
    asked: list[list[int]] = []
    tokenize = trl.GRPOTrainer._tokenize_prompts

    def noted(trainer: Any, prompts: list[str]) -> Any:
        found = tokenize(trainer, prompts)
        asked.extend(found[0])
        return found

    monkeypatch.setattr(trl.GRPOTrainer, "_tokenize_prompts", noted)
    run_training(config.model_copy(update={"data": data}), make_placement(tiny("llama")), lambda entry: None)
    text = "<s>user: 2 + 3?\nassistant: "
    assert asked == [tokenizer(text, add_special_tokens=False)["input_ids"]] * 4
    assert asked[0].count(tokenizer.bos_token_id) == 1


def test_a_prompts_template_is_no_chat_where_the_rows_have_one_as_well(tmp_path: Path) -> None:
    config = make_config(tmp_path, train={"prompt_template": "Q: {question}"})
    config = config.model_copy(update={"data": config.data.model_copy(update={"messages_field": "chat"})})
    row_set, _ = split_rows(config)
    prompts = prompts_of(row_set, config.train, tiny_tokenizer())
    tokenizer = beginning_tokenizer()
    every = token_ids(prompts, row_set.data, tokenizer)
    assert {ids[0] for ids in every} == {tokenizer.bos_token_id}


@pytest.mark.parametrize(
    ("train", "parallel", "error", "message"),
    [
        ({"num_generations": 3}, {}, ConfigError, "= 4 completions per step, which train.num_generations = 3 does not"),
        ({"engine": "trl"}, {"backend": "megatron"}, ConfigError, "train.engine is 'trl', but parallel.backend is"),
        ({"engine": "verl"}, {"backend": "deepspeed", "pp": 2}, ConfigError, "only parallel.backend=megatron hands tp"),
        ({"micro_batch_size": 8000}, {}, DataError, "a step of train.engine 'trl' asks 2000 prompts of one epoch"),
        ({"sampler": "vllm"}, {}, ConfigError, "train.sampler is vllm, but train.vllm.url names no server"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_model_is_loaded(
    tmp_path: Path, train: dict[str, Any], parallel: dict[str, Any], error: Any, message: str
) -> None:
    placement = make_placement(tiny("llama"))
    with pytest.raises(error, match=re.escape(message)):
        run_training(make_config(tmp_path, train=train, **parallel), placement, lambda entry: None)


def _zero2(rank: int, directory: str) -> dict[str, Any]:
    from plop_dist.training.trl import grpo

    path = Path(directory)
    models: list[torch.nn.Module] = []
    adapted_model = grpo.adapted_model
    grpo.adapted_model = lambda *args: models.append(adapted_model(*args)) or models[0]
    log: list[dict[str, Any]] = []
    config = make_config(path, backend="deepspeed", dp=2, zero_stage=2)
    result = run_training(config, load_placement(path), log.append)
    parameters = {name: parameter.detach().clone() for name, parameter in models[0].named_parameters()}
    return {"log": log, "result": result, "parameters": parameters}


@pytest.mark.slow
def test_completions_that_no_reward_rates_are_no_error(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    config = make_config(tmp_path, train={"rewards": ["tests.training.test_grpo:unrated"], "max_steps": 2})
    log: list[dict[str, Any]] = []
    summary = run_training(config, make_placement(tiny("llama")), log.append)
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
    assert (summary["reward_first"], summary["num_steps"]) == (None, 2)
    assert "rated no completion" in summary["note"]


@pytest.mark.slow
def test_two_ranks_at_zero_2_teach_the_chosen_modules_alone(tmp_path: Path) -> None:
    from peft import PeftModel

    save_tiny("llama", tmp_path / "model")
    placement = make_placement(tiny("llama"), types=("v_proj", "down_proj"))
    placement.source.to_file(tmp_path / "scores.json")
    placement.to_file(tmp_path / "placement.json")
    ranks = run_ranks(2, _zero2, str(tmp_path))

    log, result = ranks[0]["log"], ranks[0]["result"]
    assert [entry["step"] for entry in log] == [1, 2, 3]
    for entry in log:
        assert entry.keys() >= {"reward", "loss", "learning_rate", "grad_norm", "reward/variety", "reward/number"}
        assert entry["reward"] == pytest.approx(entry["reward/variety"] + entry["reward/number"])
        assert entry["reward"] > 0
        assert entry["grad_norm"] > 0
        assert 0 < entry["completion_length"] <= 6
        assert entry["clip_ratio/region_mean"] == 0  # of the policy that has sampled
    assert result["reward_first"] == log[0]["reward"]
    assert result["reward_last"] == log[2]["reward"]
    assert result["num_steps"] == 3

    before = dict(tiny("llama").named_parameters())
    adapted = PeftModel.from_pretrained(tiny("llama"), result["adapter"])
    saved = {name: parameter for name, parameter in adapted.named_parameters() if ".lora_" in name}
    for found in ranks:
        learned = {name: value for name, value in found["parameters"].items() if ".lora_" in name}
        assert {name.removeprefix("base_model.model.").split(".lora_")[0] for name in learned} == set(placement.modules)
        assert learned.keys() == saved.keys()
        for name, value in learned.items():
            assert bool(value.any()), f"{name} is zero"
            torch.testing.assert_close(saved[name].detach(), value)
        for name, value in found["parameters"].items():
            if ".lora_" not in name:
                path = name.removeprefix("base_model.model.").replace(".base_layer", "")
                assert torch.equal(value, before[path].detach()), f"{name} changed"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["verl", "nemo-rl"])
def test_megatron_is_handed_over_with_everything_written(tmp_path: Path, engine: str) -> None:
    save_tiny("llama", tmp_path / "model")
    placement = make_placement(tiny("llama"), types=("q_proj", "k_proj", "v_proj"))
    train = {"engine": engine, "rewards": ["builtin:number"], "lr_scheduler": "constant"}
    config = make_config(tmp_path, train=train)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "auto"})})
    parallel = config.parallel.model_copy(update={"backend": "megatron", "tp": 2, "pp": 2})
    config = config.model_copy(update={"parallel": parallel})
    summary = run_training(config, placement, lambda entry: None)
    assert f"nothing was trained: {engine} is not installed here (" in summary["note"]
    assert summary["num_steps"] == 0

    directory = tmp_path / "run" / "train" / engine
    script = Path(summary["launch"])
    assert script.parent == directory
    # A stand-in for the engine's command prints the arguments that the shell hands over.
    command = script.read_text().replace("python3 -m verl.trainer.main_ppo", "exec printf '%s\\n'")
    command = command.replace("uv run examples/run_grpo.py", "exec printf '%s\\n'")
    arguments = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout.splitlines()
    export = json.loads((directory / "export.json").read_text())
    assert len(export["flags"]) > 2
    given = dict(argument.lstrip("+").split("=", 1) for argument in arguments if "=" in argument)
    if engine == "verl":
        assert given["actor_rollout_ref.actor.megatron.tensor_model_parallel_size"] == "2"
        assert given["actor_rollout_ref.ref.megatron.pipeline_model_parallel_size"] == "2"
        assert given["actor_rollout_ref.model.lora.rank"] == "4"
        rows = load_rows(str(directory / "train.parquet"))
        assert given["data.train_files"].strip("'\"") == str(directory / "train.parquet")
        row = rows[0]
        info = {**row["extra_info"]}
        right, wrong = row["reward_model"]["ground_truth"], row["reward_model"]["ground_truth"] + "1"
        assert rewards.compute_score("", f"It is {right}.", right, info) == 1.0
        assert rewards.compute_score("", f"It is {wrong}.", right, info) == 0.0
    else:
        assert given["policy.megatron_cfg.tensor_model_parallel_size"] == "2"
        assert given["policy.megatron_cfg.peft.dim"] == "4"
        rows = load_rows(str(directory / "train.jsonl"))
        assert rows[0] == {"input": arithmetic_rows()[0]["question"], "output": arithmetic_rows()[0]["number"]}


def test_the_stage_ends_well_and_says_that_nothing_was_trained(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    train = {"engine": "verl", "rewards": ["builtin:number"], "lr_scheduler": "constant"}
    config = make_config(tmp_path, train=train)
    told: list[str] = []
    run_rank(Stages(config), ["score", "place", "train"], lambda kind, **fields: told.append(fields.get("text", "")))
    summary = json.loads((tmp_path / "run" / "train" / "summary.json").read_text())
    assert summary["method"] == "grpo"
    assert "nothing was trained" in summary["note"]
    assert summary["note"] in told
    placement = Placement.from_file(tmp_path / "run" / "placement.json")
    flags = (tmp_path / "run" / "train" / "verl" / "launch.sh").read_text()
    assert f"lora_rank={placement.rank}" in flags
