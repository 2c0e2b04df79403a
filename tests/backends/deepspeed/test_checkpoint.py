"""DeepSpeed checkpoints of a training job as the source of the weights, at another layout than they were saved at."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from plop_dist import ranks
from plop_dist.backends.hf.load import load_model
from plop_dist.checkpoints.deepspeed import find_weights
from plop_dist.config.loading import parse_config
from plop_dist.config.schema import Config, ModelConfig
from plop_dist.errors import ModelError
from plop_dist.launch.rank import run_rank
from plop_dist.rundir.stages import Stages
from tests.models import random_tokens, save_tiny, tiny
from tests.spawn import run_ranks

# Biases of 91 elements, which two ranks cannot share evenly: alignment and padding show.
SIZES: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2,
                         "intermediate_size": 91, "mlp_bias": True}  # fmt: skip
# name: (ZeRO stage, bf16, frozen embedding, tied head)
JOBS = {
    "plain": (0, False, False, False),
    "zero1-bf16": (1, True, False, True),
    "zero2": (2, False, True, False),
    "zero3": (3, False, False, True),
    "zero3-bf16": (3, True, True, False),
}


def _pretrain(rank: int, root: Path) -> None:
    """Train two steps in each job, save its checkpoint, and beside it what DeepSpeed itself says its weights are."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    for name, (stage, is_bf16, is_frozen, is_tied) in JOBS.items():
        model = tiny("llama", **SIZES, tie_word_embeddings=is_tied)
        if is_bf16:
            model = model.bfloat16()
        model.model.embed_tokens.requires_grad_(not is_frozen)
        engine = _engine(model, stage, is_bf16)
        for step in range(2):
            ids = random_tokens(2, 8, seed=2 * step + rank)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        engine.save_checkpoint(str(root / name))
        truth = {}
        for path, parameter in engine.module.named_parameters():
            if stage == 0 or not parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                    truth[path] = parameter.detach().float().clone()
            else:
                truth[path] = safe_get_full_fp32_param(parameter)
        if rank == 0:
            torch.save(truth, root / f"{name}.pt")
        engine.destroy()
    _pretrain_pipeline(rank, root)
    for stage in (0, 1):
        _pretrain_autotp(rank, root, stage)


def _pretrain_autotp(rank: int, root: Path, stage: int) -> None:
    from deepspeed.utils import safe_get_full_fp32_param

    engine = _engine(tiny("llama", **SIZES), stage, is_bf16=stage > 0, tensor_parallel={"autotp_size": 2})
    ids = random_tokens(2, 8)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.save_checkpoint(str(root / f"autotp-zero{stage}"))
    own = {
        path: parameter.detach().clone() if stage == 0 else safe_get_full_fp32_param(parameter)
        for path, parameter in engine.module.named_parameters()
    }
    both: list[Any] = [None, None]
    torch.distributed.all_gather_object(both, own)
    truth = {}
    for path, weight in both[0].items():
        kind = path.rpartition(".")[0].rpartition(".")[2]
        is_row = kind in ("o_proj", "down_proj") and path.endswith(".weight")
        is_column = kind in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
        truth[path] = torch.cat([weight, both[1][path]], int(is_row)) if is_row or is_column else weight
    if rank == 0:
        torch.save(truth, root / f"autotp-zero{stage}.pt")
    engine.destroy()


def _pretrain_pipeline(rank: int, root: Path) -> None:
    from deepspeed.pipe import PipelineModule
    from deepspeed.utils import safe_get_full_fp32_param

    from plop_dist.backends.deepspeed.stack import pipeline_layers

    loss = lambda logits, labels: torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())  # noqa: E731
    pipe = PipelineModule(pipeline_layers(tiny("llama", **SIZES).bfloat16()), num_stages=2, loss_fn=loss)
    engine = _engine(pipe, 1, is_bf16=True)
    ids = random_tokens(2, 8)
    engine.train_batch(iter([((ids, torch.arange(8).expand(2, 8).contiguous(), torch.ones_like(ids)), ids)]))
    engine.save_checkpoint(str(root / "pipeline"))
    own = {path: safe_get_full_fp32_param(parameter) for path, parameter in pipe.named_parameters()}
    stages: list[Any] = [None, None]
    torch.distributed.all_gather_object(stages, own)
    if rank == 0:
        torch.save(stages[0] | stages[1], root / "pipeline.pt")


def _engine(model: torch.nn.Module, stage: int, is_bf16: bool, **more: Any) -> Any:
    import deepspeed

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 0.01}},
        "bf16": {"enabled": is_bf16},
        "steps_per_print": 10**9,
        **more,
    }
    # What its annotations leave out: a list of parameters.
    return deepspeed.initialize(model=model, model_parameters=parameters, config=settings)[0]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    save_tiny("llama", directory / "model", **SIZES)
    save_tiny("llama", directory / "tied", **SIZES, tie_word_embeddings=True)
    run_ranks(2, _pretrain, directory)
    rows = [{"question": f"{i} + {3 * i} = ", "answer": f"{4 * i}" * (1 + i % 3)} for i in range(12)]
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    # The same weights as Hugging Face files: what everything is compared with.
    save_tiny("llama", directory / "as-hf", **SIZES, tie_word_embeddings=True)
    trained = tiny("llama", **SIZES, tie_word_embeddings=True)
    trained.load_state_dict(torch.load(directory / "zero3.pt"), strict=False)
    trained.save_pretrained(directory / "as-hf")
    return directory


def load(root: Path, name: str, **options: Any) -> Any:
    """Return the model with the weights of a job's checkpoint."""
    is_tied = JOBS[name][3] if name in JOBS else False
    fields = {"name_or_path": str(root / ("tied" if is_tied else "model")), "dtype": "float32"}
    return load_model(ModelConfig(**{**fields, "checkpoint": str(root / name), **options}))


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_weights_are_the_masters_bit_for_bit(root: Path, name: str) -> None:
    model = load(root, name)
    expected = torch.load(root / f"{name}.pt")
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for path, weight in expected.items():
        assert torch.equal(found[path], weight), path
        assert type(found[path]) is torch.nn.Parameter
    # The jobs did train.
    untrained = tiny("llama", **SIZES, tie_word_embeddings=JOBS[name][3]).get_parameter("model.norm.weight")
    assert not torch.equal(found["model.norm.weight"], untrained)


@pytest.mark.slow
def test_a_pipeline_s_layers_get_their_names_back(root: Path) -> None:
    found = dict(load(root, "pipeline").named_parameters())
    expected = torch.load(root / "pipeline.pt")
    assert len(expected) == len(found)
    for path, weight in expected.items():
        index, _, rest = path.partition(".")
        name = {"0": f"model.{rest}", "3": rest if rest.startswith("lm_head") else f"model.{rest}"}.get(
            index, f"model.layers.{int(index) - 1}.{rest.removeprefix('layer.')}"
        )
        assert torch.equal(found[name], weight), path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["autotp-zero0", "autotp-zero1"])
def test_autotp_s_shards_are_joined(root: Path, name: str) -> None:
    found = dict(load(root, name).named_parameters())
    expected = torch.load(root / f"{name}.pt")
    assert found.keys() == expected.keys()
    for path, weight in expected.items():
        assert torch.equal(found[path], weight), path
    assert not torch.equal(found["lm_head.weight"], tiny("llama", **SIZES).lm_head.weight)


@pytest.mark.slow
def test_shards_that_do_not_add_up_are_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "autotp-zero0", tmp_path / "job")
    folder = tmp_path / "job" / "global_step1"
    shutil.copy(folder / "mp_rank_01_model_states.pt", folder / "mp_rank_02_model_states.pt")
    with pytest.raises(ModelError, match=r"3 tensor-parallel shards of '.*q_proj.weight' .*ds_to_universal"):
        load(root, "autotp-zero0", checkpoint=str(tmp_path / "job"))


def test_shards_of_a_fused_linear_are_refused(tmp_path: Path) -> None:
    model = tiny("phi3")
    halves = [
        {path: weight.chunk(2)[rank] if "qkv_proj" in path else weight for path, weight in model.state_dict().items()}
        for rank in range(2)
    ]
    for rank, half in enumerate(halves):
        torch.save({"module": half, "shared_params": {}}, tmp_path / f"mp_rank_{rank:02d}_model_states.pt")
    with pytest.raises(ModelError, match=r"2 tensor-parallel shards of 'model.layers.0.self_attn.qkv_proj.weight'"):
        find_weights(tmp_path, model, {"model.layers.0.self_attn.qkv_proj"})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1-bf16", "zero3-bf16"])
def test_a_universal_checkpoint_holds_the_same(root: Path, tmp_path: Path, name: str) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    # One worker converts in this very process.
    main(
        Namespace(
            input_folder=str(root / name / "global_step2"), output_folder=str(tmp_path / "uni"), num_extract_workers=1,
            num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
        )
    )  # fmt: skip
    expected = load(root, name).state_dict()
    shutil.copytree(root / ("tied" if JOBS[name][3] else "model"), tmp_path / "model")
    fields = {"name_or_path": str(tmp_path / "model"), "dtype": "float32", "checkpoint": str(tmp_path / "uni")}
    found = load_model(ModelConfig(**fields)).state_dict()  # type: ignore[arg-type]
    for path, weight in expected.items():
        assert torch.equal(found[path], weight), path


LAYOUTS = {
    "one": {},
    "zero3": {"backend": "deepspeed", "dp": 2, "zero_stage": 3},
    "autotp": {"backend": "deepspeed", "tp": 2},
    "pipeline": {"backend": "deepspeed", "pp": 2},
    "hf_tp": {"backend": "transformers", "tp": 2},
}


def _config(root: Path, run: str, layout: str, checkpoint: str | None) -> Config:
    train = {"method": "sft", "max_steps": 2, "micro_batch_size": 2, "eval_samples": 2, "learning_rate": 0.01}
    return parse_config(
        {
            "run_dir": str(root / run),
            "model": {
                "name_or_path": str(root / ("tied" if checkpoint else "as-hf")),
                "dtype": "float32",
                "checkpoint": checkpoint and str(root / checkpoint),
            },
            "data": {"path": str(root / "rows.jsonl"), "template": "{question}{answer}", "num_samples": 5},
            "parallel": LAYOUTS[layout],
            "estimator": {"num_directions": 8},
            "placement": {"k": 2, "rank": 2},
            "train": {**train, "prompt_template": "{question}"},
        }
    )


def _run(config: Config, rank: int, stages: tuple[str, ...]) -> dict[str, Any]:
    """Return the scores, and the losses where it trains."""
    run_rank(Stages(config), stages, lambda kind, **fields: None)
    ranks.barrier()
    scores = json.loads((config.run_path / "scores.json").read_text())
    log = config.run_path / "train" / "log.jsonl"
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return {
        "scores": {module["fqn"]: (module["gain"], module["baseline"]) for module in scores["modules"]},
        "losses": [entry["loss"] for entry in entries if "loss" in entry],
    }


def _elsewhere(rank: int, root: Path, layout: str) -> dict[str, Any]:
    """Run a layout from the checkpoint; where it trains, from Hugging Face files too."""
    stages = ("score", "place", "train") if layout in TRAINED else ("score",)
    return {
        str(checkpoint): _run(_config(root, f"{layout}-{checkpoint}", layout, checkpoint), rank, stages)
        for checkpoint in ((None, "zero3") if layout in TRAINED else ("zero3",))
    }


TRAINED = ("zero3", "pipeline")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zero3", "pipeline", "hf_tp", "autotp"])
def test_other_layouts_score_and_train_as_from_hugging_face_files(root: Path, layout: str) -> None:
    truth = _run(_config(root, f"truth-{layout}", "one", None), 0, ("score",))["scores"]
    for found in run_ranks(2, _elsewhere, root, layout):
        for name, run in found.items():
            assert run["scores"].keys() == truth.keys(), name
            for fqn, values in truth.items():
                assert run["scores"][fqn] == pytest.approx(values, rel=1e-5), f"{name} {fqn}"
        if layout in TRAINED:
            assert len(found["zero3"]["losses"]) == 2
            assert found["zero3"]["losses"] == found["None"]["losses"]


@pytest.mark.slow
def test_one_process_scores_as_from_hugging_face_files(root: Path) -> None:
    truth = _run(_config(root, "truth", "one", None), 0, ("score",))["scores"]
    alone = _run(_config(root, "alone", "one", "zero3"), 0, ("score",))["scores"]
    assert alone.keys() == truth.keys()
    for fqn, values in truth.items():
        assert alone[fqn] == pytest.approx(values, rel=1e-6), fqn


@pytest.mark.slow
def test_a_changed_checkpoint_makes_scoring_run_again(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "zero2", tmp_path / "zero2")
    config = _config(root, "unused", "one", None)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"checkpoint": str(tmp_path / "zero2")})}
    )
    before = Stages(config).inputs("score")
    assert Stages(config).inputs("score") == before
    (tmp_path / "zero2" / "global_step2" / "mp_rank_00_model_states.pt").touch()
    assert Stages(config).inputs("score")["files"] != before["files"]


class _Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path):
        self._trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self._trace,)


@pytest.mark.slow
def test_foreign_objects_are_never_unpickled(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "zero2", tmp_path / "zero2")
    file = tmp_path / "zero2" / "global_step2" / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=False)
    torch.save({**state, "hidden": _Evil(tmp_path / "trace")}, file)
    with pytest.raises(ModelError, match=r"mp_rank_00_model_states.pt' holds pickled objects of '.*not opened"):
        load(root, "zero2", checkpoint=str(tmp_path / "zero2"))
    assert not (tmp_path / "trace").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "trace").exists()  # the file would have done it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lost", "message"),
    [
        ("zero2", "zero_pp_rank_1_mp_rank_00_optim_states.pt", "written by 2 .* that of rank 1 is missing"),
        ("zero3", "zero_pp_rank_0_mp_rank_00_model_states.pt", "written by 2 .* that of rank 0 is missing"),
        ("zero3", "zero_pp_rank_1_mp_rank_00_optim_states.pt", "written by 2 .* that of rank 1 is missing"),
    ],
)
def test_a_missing_rank_is_named(root: Path, tmp_path: Path, name: str, lost: str, message: str) -> None:
    copy = tmp_path / name
    shutil.copytree(root / name, copy)
    (copy / "global_step2" / lost).unlink()
    with pytest.raises(ModelError, match=message):
        load(root, name, checkpoint=str(copy))


@pytest.mark.slow
def test_what_does_not_fit_is_one_message(root: Path, tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path / "deeper", **SIZES, num_hidden_layers=3)
    lacking = (
        r"not of this LlamaForCausalLM: it lacks 'model.layers.2.*12 of its 39.*exclude_frozen_parameters, save it"
    )
    with pytest.raises(ModelError, match=lacking):
        load(root, "zero2", name_or_path=str(other))
    other = save_tiny("llama", tmp_path / "shallower", **SIZES, num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"it holds 'model\.layers\.1") as caught:
        load(root, "zero2", name_or_path=str(other))
    assert "exclude_frozen_parameters" not in str(caught.value)
    other = save_tiny("llama", tmp_path / "smaller", **SIZES, vocab_size=64)
    with pytest.raises(ModelError, match=r"embed_tokens.weight' with shape \(128, 48\), but .* makes it \(64, 48\)"):
        load(root, "zero2", name_or_path=str(other))
    shutil.copytree(root / "zero2", tmp_path / "cut")
    file = tmp_path / "cut" / "global_step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ModelError, match=r"rank_0_mp_rank_00_optim_states.pt' cannot be read .* it is cut off"):
        load(root, "zero2", checkpoint=str(tmp_path / "cut"))
    (tmp_path / "cut" / "latest").write_text("global_step9")
    with pytest.raises(ModelError, match="names 'global_step9' in its file 'latest', but has no such folder"):
        load(root, "zero2", checkpoint=str(tmp_path / "cut"))
    with pytest.raises(ModelError, match="is no checkpoint that is known"):
        load(root, "zero2", checkpoint=str(root / "model"))
