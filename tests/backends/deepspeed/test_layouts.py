"""transformers' own tensor parallelism, AutoTP and DeepSpeed pipelines: the same scores as one process."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config
from plop_dist.errors import LayoutError
from plop_dist.registry import BACKENDS, load
from tests.backends.hf.test_experts import GRANITE, LLAMA4
from tests.models import random_tokens, save_tiny
from tests.spawn import run_ranks

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5

HF, DS = {"backend": "transformers"}, {"backend": "deepspeed"}
TWO_RANKS = [
    ("llama", {**HF, "tp": 2}, "left", "lm_head"),
    ("row_bias", {**HF, "tp": 2}, "right", "none"),
    ("llama", {**HF, "dp": 2}, "right", "lm_head"),
    ("qwen2", {**DS, "tp": 2}, "left", "lm_head"),
    ("row_bias", {**DS, "tp": 2}, "right", "none"),
    ("uneven", {**DS, "tp": 2}, "left", "lm_head"),
    ("stored_bfloat16", {**DS, "tp": 2}, "left", "none"),  # its linears are converted once they are cut
    ("qwen2", {**DS, "tp": 2, "zero_stage": 1}, "right", "lm_head"),
    ("qwen2", {**DS, "pp": 2}, "left", "lm_head"),
    ("llama", {**DS, "pp": 2}, "right", "none"),
]
FOUR_RANKS = [
    ("qwen2", {**HF, "tp": 2, "dp": 2}, "left", "lm_head"),
    ("qwen2", {**DS, "tp": 2, "dp": 2}, "right", "lm_head"),
    ("qwen2", {**DS, "pp": 2, "dp": 2}, "left", "lm_head"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("layouts")
    save_tiny("qwen2", directory / "qwen2")
    save_tiny("llama", directory / "llama", tie_word_embeddings=True)
    save_tiny("llama", directory / "row_bias", attention_bias=True, mlp_bias=True)
    save_tiny("llama", directory / "uneven", hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    narrow = AutoModelForCausalLM.from_pretrained(save_tiny("qwen2", directory / "stored_bfloat16")).bfloat16()
    narrow.save_pretrained(directory / "stored_bfloat16")
    lengths = [3, 40, 7, 22, 1, 13, 30]  # seven samples in micro-batches of two: unequal shares for two replicas
    rows = [{"text": "".join(chr(33 + (7 * k + i * i) % 90) for i in range(n))} for k, n in enumerate(lengths)]
    (directory / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory


def _config(root: Path, run_dir: str, family: str, parallel: dict[str, Any], side: str, exclude: str) -> Config:
    return parse_config(
        {
            "run_dir": str(root / run_dir),
            "model": {"name_or_path": str(root / family), "dtype": "float32"},
            "data": {"path": str(root / "data.jsonl"), "text_field": "text", "batch_size": 2, "padding_side": side},
            "parallel": parallel,
            "estimator": {"num_directions": 16},
            "placement": {"exclude": [exclude]},
        }
    )


def _score(rank: int, root: Path, layouts: list[Any]) -> list[Any]:
    from plop_dist.launch.rank import score
    from plop_dist.rundir.stages import Stages

    found = []
    for number, layout in enumerate(layouts):
        config = _config(root, f"run-{len(layouts)}-{number}", *layout)
        scores = score(Stages(config), lambda kind, **fields: None)
        modules = {m.fqn: (m.gain, m.baseline, m.num_tokens, m.in_features, m.out_features) for m in scores.modules}
        found.append((modules, scores.model.num_parameters, scores.left_out))
    return found


_TRUTH: dict[Any, Any] = {}


def _truth(root: Path, family: str, exclude: str) -> Any:
    if (root, family, exclude) not in _TRUTH:
        # One process: padding on the other side would change nothing, so the right one stands for both.
        _TRUTH[root, family, exclude] = _score_alone(root, family, exclude)
    return _TRUTH[root, family, exclude]


def _score_alone(root: Path, family: str, exclude: str) -> Any:
    from plop_dist.launch.rank import score
    from plop_dist.rundir.stages import Stages

    config = _config(root, f"truth-{family}-{exclude}", family, {}, "right", exclude)
    scores = score(Stages(config), lambda kind, **fields: None)
    modules = {m.fqn: (m.gain, m.baseline, m.num_tokens, m.in_features, m.out_features) for m in scores.modules}
    return modules, scores.model.num_parameters, scores.left_out


def _check(reports: list[Any], root: Path, layouts: list[Any]) -> None:
    for number, (family, parallel, side, exclude) in enumerate(layouts):
        expected, num_parameters, left_out = _truth(root, family, exclude)
        for report in reports:
            found, found_parameters, found_left_out = report[number]
            name = f"{family} {parallel} {side}"
            assert found.keys() == expected.keys(), name
            assert found_parameters == num_parameters, name
            assert found_left_out == left_out, name
            for fqn, (gain, baseline, *sizes) in expected.items():
                assert found[fqn][0] == pytest.approx(gain, rel=TOLERANCE), f"{name}: gain of {fqn}"
                assert found[fqn][1] == pytest.approx(baseline, rel=TOLERANCE), f"{name}: baseline of {fqn}"
                assert list(found[fqn][2:]) == sizes, f"{name}: {fqn}"


def _batches() -> list[dict[str, Any]]:
    ids = random_tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    return [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids.flip(1)}, {"input_ids": ids[:1, :2]}]


def _score_host_pipeline(rank: int, root: Path) -> dict[str, Any]:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    import plop_dist
    from plop_dist.backends.deepspeed.stack import pipeline_layers

    deepspeed.init_distributed(dist_backend="gloo")
    model = AutoModelForCausalLM.from_pretrained(root / "qwen2", dtype=torch.float32)
    pipe = PipelineModule(pipeline_layers(model), num_stages=2, loss_fn=torch.nn.CrossEntropyLoss())
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
    optimizer = torch.optim.AdamW(pipe.parameters())
    engine = deepspeed.initialize(model=pipe, config=settings, optimizer=optimizer)[0]
    scores = plop_dist.score(engine, _batches(), num_directions=16)
    return {module.fqn: (module.gain, module.baseline) for module in scores.modules}


def test_host_pipeline_engine_equals_plain_model(root: Path) -> None:
    import plop_dist

    model = AutoModelForCausalLM.from_pretrained(root / "qwen2", dtype=torch.float32)
    expected = plop_dist.score(model, _batches(), num_directions=16).modules
    for found in run_ranks(2, _score_host_pipeline, root):
        assert len(found) == len(expected)
        for module in expected:
            assert found[module.fqn] == pytest.approx((module.gain, module.baseline), rel=TOLERANCE)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({**HF, "tp": 3}, r"parallel.tp is 3, .* the 4 num_key_value_heads .* use parallel.tp=2 or 4"),
        ({**DS, "tp": 5}, r"parallel.tp is 5, .* 4 num_key_value_heads.* use parallel.tp=4"),
        ({**DS, "pp": 3}, r"parallel.pp is 3, .* has 2 decoder layers; use parallel.pp=2"),
    ],
)
def test_layout_that_does_not_fit_names_the_nearest(root: Path, parallel: dict[str, Any], message: str) -> None:
    config = _config(root, "refused", "llama", parallel, "right", "lm_head")
    with pytest.raises(LayoutError, match=message):
        load(BACKENDS, config.parallel.backend).load(config)


def _refusals(rank: int, root: Path, cases: list[tuple[str, dict[str, Any], str]]) -> list[str]:
    """Return what loading each case raises."""
    found = []
    for family, parallel, _ in cases:
        config = _config(root, "refused", family, parallel, "right", "lm_head")
        with pytest.raises(LayoutError) as caught:
            load(BACKENDS, config.parallel.backend).load(config)
        found.append(str(caught.value))
    return found


def test_families_that_a_framework_cannot_cut_are_refused_on_every_rank(root: Path) -> None:
    save_tiny("llama4_text", root / "llama4_text", **LLAMA4)
    save_tiny("granitemoe", root / "granitemoe", **GRANITE)
    cases = [
        ("llama4_text", {**HF, "tp": 2}, r"Experts '.*' are sharded by transformers' .* use parallel.tp=1"),
        ("llama4_text", {**DS, "tp": 2}, r"AutoTP cannot shard Llama4ForCausalLM \(.*\); use parallel.zero_stage=3"),
        ("granitemoe", {**DS, "tp": 2}, r"cannot shard GraniteMoeForCausalLM: it leaves every layer whole"),
    ]
    for found in run_ranks(2, _refusals, root, cases):
        for message, (_, _, expected) in zip(found, cases, strict=True):
            assert re.search(expected, message), message


def test_two_ranks_equal_one_process(root: Path) -> None:
    _check(run_ranks(2, _score, root, TWO_RANKS), root, TWO_RANKS)


def test_four_ranks_equal_one_process(root: Path) -> None:
    _check(run_ranks(4, _score, root, FOUR_RANKS), root, FOUR_RANKS)


def _private_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def _grow(rank: int, root: Path) -> tuple[int, int]:
    """Load at ZeRO-3; return by how much this rank's private memory has grown, and the model's bytes."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    config = _config(root, "grown", "large", {**DS, "dp": 2, "zero_stage": 3}, "right", "lm_head")
    load(BACKENDS, "deepspeed").load(
        config.model_copy(update={"model": config.model.model_copy(update={"name_or_path": str(root / "llama")})})
    )  # what a first load imports and allocates is not the model's
    before = _private_bytes()
    model = load(BACKENDS, "deepspeed").load(config)
    return _private_bytes() - before, 4 * model.describe()["num_parameters"]


def test_no_rank_holds_the_whole_model_at_zero3(root: Path) -> None:
    save_tiny("llama", root / "large", hidden_size=512, intermediate_size=2048, num_hidden_layers=10)
    for grown, size in run_ranks(2, _grow, root):
        assert size > 100e6
        assert grown < 0.65 * size, f"a rank grew by {grown:,} bytes for a model of {size:,}"
