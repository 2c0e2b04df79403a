"""The launch.sh of each engine that runs by itself: read by the engine's own configuration code, key by key."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config, TrainConfig
from plop_dist.data.builtin import arithmetic_rows
from plop_dist.errors import ConfigError, DataError, LayoutError
from plop_dist.registry import EXTERNAL_ENGINES, load
from plop_dist.training.external.train_keys import SHARED
from tests.exporters.test_real_parsers import INSTALLED, ROOT, is_installed
from tests.models import save_tiny, tiny
from tests.training.cases import make_placement

ENGINES = tuple(EXTERNAL_ENGINES.own)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3?"}]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
TP2_PP2 = {"backend": "megatron", "tp": 2, "pp": 2, "sequence_parallel": True}
TP4 = {"backend": "megatron", "tp": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "model"
    save_tiny("llama", path)
    return path


def make_config(checkpoint: Path, directory: Path, engine: str, parallel: Any = None, **sections: Any) -> Config:
    train = {"method": "grpo", "engine": engine, "answer_field": "number", "lr_scheduler": "constant", "max_steps": 9}
    return parse_config(
        {
            "run_dir": str(directory / "run"),
            "model": {"name_or_path": str(checkpoint), **sections.get("model", {})},
            "data": {"path": "builtin:arithmetic", **sections.get("data", {})},
            "parallel": parallel or {},
            "cluster": sections.get("cluster", {}),
            "train": {**train, **sections.get("train", {})},
        }
    )


@functools.cache
def placement_of(types: tuple[str, ...]):
    return make_placement(tiny("llama"), types=types)


def hand_over(config: Config, types: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")) -> Path:
    summary = load(EXTERNAL_ENGINES, config.train.engine).train(config, placement_of(types), lambda entry: None)
    return Path(summary["launch"])


def command_of(script: Path, directory: Path) -> tuple[list[str], dict[str, str]]:
    """Return the words of the first command that launch.sh runs, and its environment; stand-ins take both down."""
    stand_ins = directory / "bin"
    stand_ins.mkdir(exist_ok=True)
    for name in ("python3", "uv"):
        program = stand_ins / name
        lines = "import json, os, sys", "print(json.dumps([sys.argv[1:], dict(os.environ)]))", "sys.exit(9)"
        program.write_text("\n".join([f"#!{sys.executable}", *lines, ""]))
        program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stand_ins}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 9, done.stderr  # the engine's exit status is the script's, and nothing runs after it
    words, variables = json.loads(done.stdout)
    return words, variables


def read_by(engine: str, scripts: list[Path], directory: Path) -> list[dict[str, Any]]:
    """Return what the engine's own configuration code makes of each launch.sh."""
    given = [command_of(script, directory) for script in scripts]
    for _, variables in given:
        variables |= {"PATH": os.environ["PATH"], "WANDB_API_KEY": "none"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.engine_configs", engine, str(INSTALLED / engine)]
    done = subprocess.run(
        command, cwd=ROOT, input=json.dumps(given), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("found: ")]
    return json.loads(line.removeprefix("found: "))


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 12), reason="Megatron needs Python 3.12")
@pytest.mark.parametrize("engine", ["verl", "skyrl"])
def test_an_engine_accepts_its_launch(engine: str, model: Path, tmp_path: Path) -> None:
    """On one node and on two, with Megatron and with FSDP; prompts arrive in the words that were scored."""
    if not is_installed(engine):
        pytest.skip(f"{engine} is not installed in .cache/parsers: `make test` does that where it has a network")
    types, train = ("v_proj", "up_proj", "down_proj"), {"weight_decay": 0.25, "warmup_steps": 3}
    chats, data = chat_model(model, tmp_path)
    one = make_config(model, tmp_path / "1", engine, TP2_PP2, train=train)
    two = make_config(model, tmp_path / "2", engine, TP4, cluster={"gpus_per_node": 2}, train=train)
    wandb = {"loggers": ["wandb"], "lr_scheduler": "cosine"}
    fsdp = make_config(chats, tmp_path / "3", engine, {"dp": 2}, data=data, train=wandb)
    scripts = [hand_over(one, types), hand_over(two, types), hand_over(fsdp)]
    *megatron, last = read_by(engine, scripts, tmp_path)
    for found, nodes, sizes in zip(megatron, ([1, 4], [2, 2]), ((2, 2), (4, 1)), strict=True):
        assert (found["nodes"], (found["tp"], found["pp"])) == (nodes, sizes)
        assert (found["lora_type"], found["targets"]) == ("canonical_lora", ["linear_v", "linear_fc1_up", "linear_fc2"])
        assert (found["weight_decay"], found["warmup"], found["schedule"][:8]) == (0.25, 3, "constant")
        assert "wandb" not in found["logger"]
        assert found["prompt"] == arithmetic_rows()[0]["question"], "a text is asked as it is"
        assert found.get("merge_lora", False) is False
    assert (last["nodes"], last["schedule"]) == ([1, 2], "cosine")
    assert sorted(last["targets"]) == ["k_proj", "q_proj", "v_proj"]
    assert last["logger"] == {"verl": ["console", "file", "wandb"], "skyrl": ["wandb"]}[engine]
    assert last["prompt"] == "<system>Be brief.<user>2 + 3?<a>"
    assert last.get("rated", [1.0, 0.0]) == [1.0, 0.0]


def chat_model(model: Path, directory: Path) -> tuple[Path, dict[str, Any]]:
    """Return a checkpoint with a chat template, and the data section of rows that are chats."""
    from transformers import AutoTokenizer

    rows = directory / "chats.jsonl"
    row = {"chat": [*CHAT, {"role": "assistant", "content": "5"}], "answer": "2 + 3 = 5", "number": "5"}
    rows.write_text(f"{json.dumps(row)}\n" * 40)
    chats = directory / "model"
    save_tiny("llama", chats)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(chats)
    return chats, {"path": str(rows), "messages_field": "chat"}


def test_nemo_rl_asks_with_one_message_and_refuses_rows_of_several(model: Path, tmp_path: Path) -> None:
    chats, data = chat_model(model, tmp_path)
    with pytest.raises(DataError, match="row 1 of the train rows begins with messages of system, user, but nemo-rl"):
        hand_over(make_config(chats, tmp_path, "nemo-rl", TP2_PP2, data=data))


def test_a_chat_that_reads_otherwise_once_tables_fill_its_keys_is_refused(model: Path, tmp_path: Path) -> None:
    chats, data = chat_model(model, tmp_path)
    rows = [
        {"chat": [*CHAT, {"role": "user", "content": "?", "name": "Ada"}], "number": "5"},
        {"chat": CHAT, "number": "5"},
    ]
    Path(data["path"]).write_text("".join(f"{json.dumps(row)}\n" for row in rows * 20))
    hand_over(make_config(chats, tmp_path / "1", "verl", TP2_PP2, data=data))
    named = "{% for m in messages %}{% if m.name is defined %}{{ m.name }}: {% endif %}{{ m.content }}{% endfor %}"
    (chats / "chat_template.jinja").write_text(named)
    with pytest.raises(DataError, match=r"row 1: messages lack the keys name of others, .* fills with null"):
        hand_over(make_config(chats, tmp_path / "2", "verl", TP2_PP2, data=data))


@pytest.mark.parametrize("parallel", [{"dp": 2}, TP2_PP2, TP4])
def test_nemo_rl_finds_every_key_in_its_example_configuration(
    parallel: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    """The keys of release 0.7's grpo_math_1B.yaml, and what grpo_math_1B_megatron.yaml lays over it."""
    from tests.training.nemo_rl_example import EXAMPLE

    script = hand_over(make_config(model, tmp_path, "nemo-rl", parallel, cluster={"gpus_per_node": 2}))
    words, variables = command_of(script, tmp_path)
    given = [word for word in words if "=" in word and not word.startswith("--")]
    assert len(given) > 40
    for word in given:
        key = word.partition("=")[0]
        assert (key.removeprefix("+") in EXAMPLE) is not key.startswith("+"), key
    fields = dict(word.lstrip("+").split("=", 1) for word in given)
    world = parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("dp", 1)
    assert (fields["cluster.num_nodes"], fields["cluster.gpus_per_node"]) == (str(world // 2), "2")
    assert (fields["checkpointing.enabled"], fields["data.default.prompt_file"]) == ("true", "null")
    assert fields["loss_fn.reference_policy_kl_penalty"] == "0.0"
    assert fields["grpo.max_num_epochs"] == fields["grpo.max_num_steps"] == "9"
    assert Path(fields["data.train.data_path"].strip('"')).is_file()
    if "tp" in parallel:
        assert fields["policy.megatron_cfg.scheduler.lr_warmup_iters"] == "0"
        assert variables["NRL_MEGATRON_CHECKPOINT_DIR"].startswith(str(tmp_path))
    else:
        assert fields["policy.dtensor_cfg.lora_cfg.use_triton"] == "false"


OTHER = {
    "method": "sft", "lr_scheduler": "cosine", "rewards": ["builtin:format"], "loggers": ["tensorboard"],
    "prompt_template": "{question}\n", "packing": True, "temperature": 0.5, "num_generations": 2,
    "sampler": "model", "loss_type": "grpo", "importance_sampling_level": "sequence", "scale_rewards": "none",
    "reward_weights": [0.5], "vllm": {"url": "http://localhost:8000"},
}  # fmt: skip


def another(key: str) -> Any:
    """Return a value of a key of `train` that is not its default."""
    if key in OTHER:
        return OTHER[key]
    default = TrainConfig.model_fields[key].get_default(call_default_factory=True)
    if isinstance(default, bool):
        return not default
    return default * 2 if isinstance(default, int) and default else 0.125 if isinstance(default, float) else 4


@pytest.mark.parametrize("parallel", [{}, {"backend": "megatron"}], ids=["one process", "megatron"])
@pytest.mark.parametrize("key", sorted(TrainConfig.model_fields.keys() - SHARED - {"lr_scheduler"}))
@pytest.mark.parametrize("engine", ENGINES)
def test_every_key_of_train_reaches_the_engine_or_is_refused_by_name(
    engine: str, key: str, parallel: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    """Of every key in the schema, whichever joins it: none is dropped in silence."""
    plain = hand_over(make_config(model, tmp_path, engine, parallel)).parent
    before = {path.name: path.read_bytes() for path in plain.iterdir()}
    config = make_config(model, tmp_path, engine, parallel, train={key: another(key)})
    try:
        load(EXTERNAL_ENGINES, engine).check(config)
    except ConfigError:
        with pytest.raises(ConfigError, match=rf"train\.{key} is .* train\.engine '{engine}'"):
            hand_over(config)
    else:
        changed = hand_over(config).parent
        assert {path.name: path.read_bytes() for path in changed.iterdir()} != before


@pytest.mark.parametrize("engine", ENGINES)
def test_what_an_engine_has_no_words_for_is_refused_before_anything_is_scored(
    engine: str, model: Path, tmp_path: Path
) -> None:
    handed = load(EXTERNAL_ENGINES, engine)
    with pytest.raises(LayoutError, match=r"= 4 GPUs, which nodes of 3 \(cluster.gpus_per_node\) do not make up"):
        handed.check(make_config(model, tmp_path, engine, TP4, cluster={"gpus_per_node": 3}))
    with pytest.raises(ConfigError, match=r"= 4 completions per step, which train\.num_generations = 3 does not"):
        handed.check(make_config(model, tmp_path, engine, train={"num_generations": 3}))
    quantised = {"quantization": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    with pytest.raises(ConfigError, match=r"reads Hugging Face weights by itself, but model\.quantization is"):
        handed.check(make_config(model, tmp_path, engine, model=quantised))


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_that_an_engine_would_leave_out_in_silence_are_refused(engine: str, model: Path, tmp_path: Path) -> None:
    rows = [*arithmetic_rows()[:39], {**arithmetic_rows()[0], "question": "1 + " * 60}]
    data = {"path": str(tmp_path / "rows.jsonl")}
    Path(data["path"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"max_length": 150, "prompt_template": "{question}"}
    config = make_config(model, tmp_path, engine, data=data, train=train)
    with pytest.raises(DataError, match=r"row 40: the prompt has 2\d\d tokens, but train\.max_length is 150, and"):
        hand_over(config)
    train = {"gradient_accumulation_steps": 9, "prompt_template": "{question}"}
    config = make_config(model, tmp_path, engine, data=data, train=train)
    with pytest.raises(DataError, match=r"has 8 rows to train on, but a step of .* asks 9 prompts of one epoch"):
        hand_over(config)


def test_a_python_is_named_with_what_it_lacks(model: Path, tmp_path: Path) -> None:
    handed = load(EXTERNAL_ENGINES, "verl")
    missing = make_config(model, tmp_path, "verl", train={"engine_python": str(tmp_path / "none")})
    with pytest.raises(ConfigError, match=r"train.engine_python '.*none' does not run as a Python interpreter"):
        handed.check(missing)
    with pytest.raises(ConfigError, match=r"train.engine_python: .* \(Python 3\..*\) lacks verl, .*which train.engine"):
        handed.check(make_config(model, tmp_path, "verl", train={"engine_python": sys.executable}))


def test_a_checkpoint_with_code_is_not_handed_to_who_would_run_it(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    save_tiny("llama", own)
    tree = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**tree, "auto_map": {"AutoConfig": "theirs.Config"}}))
    for engine in ("skyrl", "nemo-rl"):
        with pytest.raises(ConfigError, match="runs Python code that comes with a checkpoint without asking, and conf"):
            load(EXTERNAL_ENGINES, engine).check(make_config(own, tmp_path, engine))
