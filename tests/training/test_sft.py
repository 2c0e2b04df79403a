"""SFT through TRL: equals a plain PEFT loop, in one process and under ZeRO-3; resumes; follows the NFN on the way."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from plop_dist import ranks
from plop_dist.backends.hf.load import load_tokenizer
from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config
from plop_dist.errors import ConfigError, ExportError, RunDirError
from plop_dist.launch.rank import run_rank
from plop_dist.rundir.stages import Stages
from plop_dist.training.batch import without_targets
from plop_dist.training.data import TrainingData, collate
from plop_dist.training.loop import learning_rate_at
from plop_dist.training.train import train as run_training
from plop_dist.training.trl.setup import adapted_model
from plop_dist.values.placement import Placement
from plop_dist.values.scores import Scores
from tests.exporters.cases import place, projections_of, scores_of
from tests.models import save_tiny, tiny
from tests.spawn import run_ranks
from tests.training.cases import (
    CUT_AFTER,
    RESUMED_STEPS,
    KilledError,
    assert_equal,
    check_adapter,
    make_placement,
    reference,
)

HELD_OUT = 3


def make_config(
    directory: Path, run: str, *, rows: int, train: dict[str, Any] | None = None, **parallel: Any
) -> Config:
    """Return a configuration over a file of short sums; the step sees 4 rows whatever the number of replicas."""
    path = directory / f"rows-{rows}.jsonl"
    if not path.is_file():
        lines = [
            json.dumps({"question": f"{i} + {3 * i} = ", "answer": f"{4 * i}" * (1 + i % 3)})
            for i in range(rows + HELD_OUT)
        ]
        path.write_text("\n".join(lines))
    options = {"method": "sft", "max_steps": 10, "learning_rate": 0.01, "warmup_steps": 1, "max_grad_norm": 0.3,
               "micro_batch_size": 4 // parallel.get("dp", 1), "eval_samples": HELD_OUT, "save_steps": 4,
               "prompt_template": "{question}", "seed": 5}  # fmt: skip
    return parse_config(
        {
            "run_dir": str(directory / run),
            "model": {"name_or_path": str(directory / "model"), "dtype": "float32"},
            "data": {"path": str(path), "template": "{question}{answer}", "num_samples": 7, "batch_size": 2},
            "placement": {"k": 2, "rank": 4, "alpha": 8},
            "parallel": parallel,
            "train": {**options, **(train or {})},
        }
    )


def run_stages(config: Config, stages: tuple[str, ...] = ("score", "place", "train")) -> dict[str, Any]:
    """Run the stages on this rank and return the training's log by kind, and its summary."""
    run_rank(Stages(config), stages, lambda kind, **fields: None)
    ranks.barrier()
    directory = config.run_path / "train"
    entries = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return {
        "losses": [entry["loss"] for entry in entries if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in entries if "loss" in entry],
        "nfn": {entry["step"]: entry["nfn"] for entry in entries if "nfn" in entry},
        "summary": json.loads((directory / "summary.json").read_text()),
    }


def check(found: dict[str, Any], config: Config) -> None:
    """Assert that a run over 4 rows is what plain PEFT makes of them, and that the tracked NFN are the models'."""
    placement = Placement.from_file(config.run_path / "placement.json")
    data = TrainingData(config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": 4})}),
                        load_tokenizer(config.model))  # fmt: skip
    expected = reference(tiny("llama"), config, placement, data, per_step=1)
    assert_equal("loss", found["losses"], expected["losses"])
    assert_equal("grad_norm", found["norms"], expected["norms"])
    for step, gradients in enumerate(found.get("gradients", ())):
        clipped = min(1.0, config.train.max_grad_norm / expected["norms"][step])
        for name, gradient in expected["gradients"][step].items():
            assert_equal(f"step {step} {name}", gradients[name] * clipped, gradient)
    summary = found["summary"]
    assert_equal("held-out", summary["held_out_after"], expected["held_out_after"])
    assert summary["held_out_after"] < summary["held_out_before"]
    check_adapter(expected, Path(summary["adapter"]), "llama")

    assert sorted(found["nfn"]) == [0, 5, 10]
    scores = Scores.from_file(config.run_path / "scores.json")
    assert found["nfn"][0] == pytest.approx({entry.type: entry.nfn for entry in scores.types}, rel=1e-5)
    merged = score_of_merged(config, Path(summary["adapter"]))
    assert found["nfn"][10] == pytest.approx(merged, rel=1e-4)
    moved = {name for name, value in merged.items() if abs(value / found["nfn"][0][name] - 1) > 1e-3}
    assert set(placement.module_types) <= moved


def score_of_merged(config: Config, adapter: Path) -> dict[str, float]:
    """Return the NFN per type of the model with the adapter merged into its weights, scored from scratch."""
    from peft import PeftModel

    directory = adapter.parent / "merged"
    PeftModel.from_pretrained(tiny("llama"), adapter).merge_and_unload().save_pretrained(directory)
    load_tokenizer(config.model).save_pretrained(directory)
    tree = config.model_dump(mode="json")
    tree |= {"run_dir": str(directory / "run"), "parallel": {}}
    tree["model"]["name_or_path"] = str(directory)
    run_rank(Stages(parse_config(tree)), ["score"], lambda kind, **fields: None)
    return {entry.type: entry.nfn for entry in Scores.from_file(directory / "run" / "scores.json").types}


def train_and_resume(config: Config, run_dir: Path, placement: Placement) -> list[list[dict[str, Any]]]:
    """Return the log of a whole training, and of one that was killed after step 7 and started again."""
    whole: list[dict[str, Any]] = []
    run_training(config, placement, whole.append)
    config = config.model_copy(update={"run_dir": str(run_dir)})
    cut: list[dict[str, Any]] = []

    def dying(entry: dict[str, Any]) -> None:
        cut.append(entry)
        if entry["step"] == CUT_AFTER:
            raise KilledError

    with pytest.raises(KilledError):
        run_training(config, placement, dying)
    resumed: list[dict[str, Any]] = []
    result = run_training(config, placement, resumed.append)
    assert result["num_steps"] == 10
    assert result["held_out_before"] > result["held_out_after"]
    return [whole, resumed]


def check_resumed(whole: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> None:
    """Assert that the second start began after the checkpoint of step 4 and went on as if nothing had happened."""
    assert [entry["step"] for entry in resumed] == RESUMED_STEPS
    for key in ("loss", "grad_norm", "learning_rate"):
        assert_equal(key, [entry[key] for entry in resumed], [entry[key] for entry in whole[4:]])


@pytest.mark.slow
def test_one_process_equals_plain_peft(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    config = make_config(tmp_path, "run", rows=4, train={"track_nfn_every": 5})
    check(run_stages(config), config)


@pytest.mark.slow
def test_resumes_where_it_was_cut_off(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    placement = make_placement(tiny("llama"))
    config = make_config(tmp_path, "whole", rows=13, train={"micro_batch_size": 2, "gradient_accumulation_steps": 2})
    whole, resumed = train_and_resume(config, tmp_path / "cut", placement)
    expected = reference(tiny("llama"), config, placement, TrainingData(config, load_tokenizer(config.model)), 2)
    assert_equal("loss", [entry["loss"] for entry in whole], expected["losses"])  # in the order of the other engines
    assert_equal("rate", [e["learning_rate"] for e in whole], [learning_rate_at(config.train, s) for s in range(10)])
    assert len({round(entry["loss"], 4) for entry in whole}) == 10, "every step has rows of its own"
    check_resumed(whole, resumed)


@contextmanager
def whole_gradients() -> Iterator[list[dict[str, torch.Tensor]]]:
    """Yield a list that gets every step's averaged gradients by name, before DeepSpeed clips them."""
    from deepspeed import DeepSpeedEngine
    from deepspeed.utils import safe_get_full_grad

    step_of = DeepSpeedEngine.step
    seen: list[dict[str, torch.Tensor]] = []

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        seen.append({name: safe_get_full_grad(p).clone() for name, p in trained.items()})  # type: ignore[union-attr]
        return step_of(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepSpeedEngine, "step", step)
        yield seen


def _zero3(rank: int, directory: str) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    path, layout = Path(directory), {"backend": "deepspeed", "dp": 2, "zero_stage": 3}
    with whole_gradients() as gradients:
        found = run_stages(make_config(path, "run", rows=4, train={"track_nfn_every": 5}, **layout))
    found["gradients"] = gradients
    placement = Placement.from_file(path / "run" / "placement.json")
    return found, train_and_resume(make_config(path, "whole", rows=13, **layout), path / "cut", placement)


@pytest.mark.slow
def test_two_ranks_at_zero_3_equal_plain_peft_and_resume(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    for rows in (4, 13):
        make_config(tmp_path, "run", rows=rows)
    results = run_ranks(2, _zero3, str(tmp_path))
    found, (whole, resumed) = results[0]
    assert len(found["gradients"]) == 10
    check(found, make_config(tmp_path, "run", rows=4, dp=2, backend="deepspeed", zero_stage=3))
    check_resumed(whole, resumed)
    one_process: list[dict[str, Any]] = []
    placement = Placement.from_file(tmp_path / "run" / "placement.json")
    run_training(make_config(tmp_path, "one", rows=13), placement, one_process.append)
    assert_equal("loss", [entry["loss"] for entry in whole], [entry["loss"] for entry in one_process])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny("llama", tmp_path / "model")
    placement = make_placement(tiny("llama"))
    config = make_config(tmp_path, "run", rows=4, train={"max_steps": 4, "save_steps": 2})
    run_training(config, placement, lambda entry: None)
    path = config.run_path / "train" / "checkpoints" / "checkpoint-4" / name
    path.write_bytes(path.read_bytes()[:100])
    log: list[dict[str, Any]] = []
    run_training(config, placement, log.append)
    assert [entry["step"] for entry in log] == [3, 4]
    assert "checkpoint-4 is damaged; training goes on from an earlier checkpoint" in caplog.text


@pytest.mark.slow
def test_a_full_disk_names_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save_tiny("llama", tmp_path / "model")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunDirError, match=r"train/checkpoints cannot be written: .*No space left on device"):
        run_training(make_config(tmp_path, "run", rows=4), make_placement(tiny("llama")), lambda entry: None)


def test_adapters_of_every_kind_begin_as_the_seed_says(tmp_path: Path) -> None:
    for family, types in (("gpt2", ("c_attn", "c_fc")), ("phi3", ("q_proj", "k_proj", "v_proj"))):
        save_tiny(family, tmp_path / "model")
        placement = make_placement(tiny(family), types=types)
        first, again, other = (
            adapted_model(make_config(tmp_path, "run", rows=4, train={"seed": seed}), placement) for seed in (5, 5, 6)
        )
        pairs = [(n, p, q, r) for (n, p), (_, q), (_, r) in zip(*map(_adapters, (first, again, other)), strict=True)]
        assert pairs
        for name, weight, same, different in pairs:
            assert torch.equal(weight, same), name
            assert "lora_B" in name or not torch.equal(weight, different), name


def _adapters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if ".lora_" in name]


def test_a_part_of_a_fused_linear_trains_where_widening_is_accepted(tmp_path: Path) -> None:
    save_tiny("phi3", tmp_path / "model")
    placement = make_placement(tiny("phi3"), types=("v_proj", "down_proj"))
    config = make_config(tmp_path, "run", rows=4)
    with pytest.raises(ExportError, match=r"cannot adapt model\.layers\.0\.self_attn\.v_proj alone"):
        adapted_model(config, placement)
    widened = config.model_copy(update={"export": config.export.model_copy(update={"widen": True})})
    adapted = {name.split(".")[-4] for name, _ in _adapters(adapted_model(widened, placement))}
    assert adapted == {"qkv_proj", "down_proj"}


def test_dropout_beside_adapted_parameters_is_refused(tmp_path: Path) -> None:
    save_tiny("qwen3_moe", tmp_path / "model")
    config = make_config(tmp_path, "run", rows=4, train={"lora_dropout": 0.1})
    placement = place(scores_of(projections_of(tiny("qwen3_moe"))), ["experts.down_proj"])
    with pytest.raises(
        ConfigError, match=r"train\.lora_dropout is 0\.1, but .*down_proj can only be adapted as parameters"
    ):
        adapted_model(config, placement)


class Unpacked:
    """The rows of a packed training, each example alone in its micro-batch."""

    def __init__(self, config: Config) -> None:
        packed = TrainingData(config, load_tokenizer(config.model))
        accumulation = config.train.gradient_accumulation_steps
        self.held_out = packed.held_out
        self._steps = []
        for step in range(config.train.max_steps):
            rows = [row for index in range(accumulation) for row in packed.rows_of(step * accumulation + index)]
            assert max(len(row) for row in rows) > 1, "nothing was packed"
            self._steps.append([example for row in rows for example in row])
        self.per_step = max(map(len, self._steps))

    def micro_batch(self, index: int) -> dict[str, torch.Tensor]:
        step, at = divmod(index, self.per_step)
        examples = self._steps[step]
        batch = collate([[examples[min(at, len(examples) - 1)]]], 0)
        return batch if at < len(examples) else without_targets(batch)


@pytest.mark.slow
def test_packed_samples_do_not_see_each_other(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    placement = make_placement(tiny("llama"))
    packing = {"packing": True, "max_length": 40, "micro_batch_size": 2, "gradient_accumulation_steps": 2}
    config = make_config(tmp_path, "run", rows=40, train=packing)
    log: list[dict[str, Any]] = []
    result = run_training(config, placement, log.append)
    unpacked = Unpacked(config)
    expected = reference(tiny("llama"), config, placement, unpacked, unpacked.per_step)
    assert_equal("loss", [entry["loss"] for entry in log], expected["losses"])
    assert_equal("grad_norm", [entry["grad_norm"] for entry in log], expected["norms"])
    check_adapter(expected, Path(result["adapter"]), "llama")
    assert all(entry["tokens_per_second"] > 0 for entry in log)


@pytest.mark.slow
def test_one_rank_at_zero_3_needs_no_launcher(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    config = make_config(tmp_path, "run", rows=4, train={"max_steps": 1, "track_nfn_every": 1}, backend="deepspeed",
                         zero_stage=3)  # fmt: skip
    found = run_stages(config)
    assert found["summary"]["num_steps"] == 1
    assert sorted(found["nfn"]) == [0, 1]


@pytest.mark.slow
def test_only_the_chosen_modules_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / "model")
    placement = make_placement(tiny("llama"), types=("v_proj",))
    models: list[torch.nn.Module] = []
    monkeypatch.setattr(
        "plop_dist.training.trl.sft.adapted_model", lambda *args: models.append(adapted_model(*args)) or models[0]
    )
    run_training(make_config(tmp_path, "run", rows=4), placement, lambda entry: None)
    before = dict(tiny("llama").named_parameters())
    seen = set()
    for name, parameter in models[0].named_parameters():
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if ".lora_" in path:
            seen.add(path.split(".lora_")[0])
            assert bool(parameter.any()), f"{name} is zero"
        else:
            assert torch.equal(parameter, before[path]), f"{name} changed"
    assert seen == set(placement.modules)


@pytest.mark.slow
def test_a_model_that_names_its_body_otherwise_trains(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4,
             "num_experts_per_tok": 2}  # fmt: skip
    save_tiny("llama4_text", tmp_path / "model", **sizes)
    config = make_config(tmp_path, "run", rows=4)
    config = config.model_copy(
        update={"placement": config.placement.model_copy(update={"include": ["v_proj", "o_proj"]})}
    )
    run = run_stages(config)
    assert run["losses"][-1] < run["losses"][0]
