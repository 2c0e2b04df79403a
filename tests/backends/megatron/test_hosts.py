"""Megatron model lists as hosts bring them: built without Bridge, several chunks per rank, wrapped for training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import plop_dist
from plop_dist.values.scores import Scores
from tests.backends.megatron.models import config, fresh, samples
from tests.installed import needs_bridge
from tests.models import save_tiny, tiny
from tests.spawn import run_ranks
from tests.te_on_cpu.install import each_specification_rarely, specified

pytestmark = [pytest.mark.slow, needs_bridge]
OLDER = Path(__file__).parents[3] / ".cache" / "older" / "megatron-core"
# Four layers over two stages that share them evenly, and not: Megatron's ways to say so.
PIPELINES: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}),
    "virtual": (2, {}),
    "first": (1, {"num_layers_in_first_pipeline_stage": 1}),
    "last": (1, {"num_layers_in_last_pipeline_stage": 1}),
    "embeddings alone": (1, {"pipeline_model_parallel_layout": "E|ttttL"}),
    "uneven virtual": (2, {"pipeline_model_parallel_layout": "Ett|t||tL"}),
    "nothing first": (2, {"pipeline_model_parallel_layout": "Ett||t|tL"}),
}
LAYOUTS = {"bridge": (2, 2, 1), **dict.fromkeys(PIPELINES, (2, 2, 1)), "wrapped": (2, 1, 2)}
FIELDS = {"num_hidden_layers": 4, "head_dim": 8}


def _batches(share: int, num_shares: int) -> list[dict[str, Any]]:
    """Return this replica's rows, one to a batch, under the ids that they have among all rows."""
    rows = list(enumerate(samples()))[share::num_shares]
    return [{"input_ids": row[None], "sample_ids": 0 * row[None] + number} for number, row in rows]


def _plain_chunks(directory: Path, checkpoint: Path, virtual: int, pipeline: dict[str, Any]) -> list[nn.Module]:
    """Build GPTModels as Megatron-LM's pretrain_gpt.py does at tp 2, pp 2, with `virtual` chunks per rank."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from transformers import AutoConfig

    from plop_dist.backends.megatron.checkpoint import load_checkpoint

    hf = AutoConfig.from_pretrained(directory)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    own = TransformerConfig(
        num_layers=4, hidden_size=hf.hidden_size, ffn_hidden_size=hf.intermediate_size, num_attention_heads=8,
        num_query_groups=4, kv_channels=8, normalization="RMSNorm", layernorm_epsilon=hf.rms_norm_eps,
        activation_func=nn.functional.silu, gated_linear_unit=True, add_bias_linear=False, qk_layernorm=True,
        hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True, masked_softmax_fusion=False,
        persist_layer_norm=False, tensor_model_parallel_size=2, pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None, pipeline_dtype=hf.dtype, **pipeline,
    )  # fmt: skip
    stage = parallel_state.get_pipeline_model_parallel_rank()
    chunks: list[nn.Module] = [
        GPTModel(
            own, get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm"), hf.vocab_size, 64,
            pre_process=stage == 0 and number == 0, post_process=stage == 1 and number == virtual - 1,
            share_embeddings_and_output_weights=False, position_embedding_type="rope", rotary_base=10000,
            vp_stage=number if virtual > 1 else None,
        )
        for number in range(virtual)
    ]  # fmt: skip
    load_checkpoint(chunks, checkpoint, hf.vocab_size)
    return [chunk.train() for chunk in chunks]


def _bridge_job(rank: int, root: Path) -> dict[str, Scores]:
    """Score the chunk that Bridge loads, and leave it as root/checkpoint."""
    from megatron.core import dist_checkpointing

    from plop_dist.backends.megatron.backend import load_chunks

    (chunk,), _ = load_chunks(config(root / "model", tp=2, pp=2))
    checkpoint = root / "checkpoint"
    if rank == 0:
        checkpoint.mkdir()
    dist.barrier()
    dist_checkpointing.save({"model": chunk.sharded_state_dict()}, str(checkpoint))
    found = {"bridge": plop_dist.score([chunk], _batches(0, 1), num_directions=4, exclude=())}
    fresh()
    return found


def _plain_job(rank: int, root: Path) -> dict[str, Scores]:
    """Score model lists that are built without Bridge and read root/checkpoint."""
    found = {}
    for name, (virtual, pipeline) in PIPELINES.items():
        chunks = _plain_chunks(root / "model", root / "checkpoint", virtual, pipeline)
        assert len(chunks) == virtual
        found[name] = plop_dist.score(chunks, _batches(0, 1), num_directions=4, exclude=())
        assert all(chunk.training for chunk in chunks)
        fresh()
    return found


def _older_job(rank: int, root: Path, directory: Path) -> dict[str, Scores]:
    sys.path.insert(0, str(directory))
    import megatron.core

    from plop_dist.backends.megatron import cpu

    assert Path(megatron.core.__file__).is_relative_to(directory)
    cpu.prepare()
    return _plain_job(rank, root)


def _job(rank: int, root: Path) -> dict[str, Scores]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from plop_dist.backends.megatron.backend import load_chunks

    found = _bridge_job(rank, root) | _plain_job(rank, root)
    chunks, _ = load_chunks(config(root / "model", tp=2, dp=2, sequence_parallel=True))
    settings = DistributedDataParallelConfig(overlap_grad_reduce=False, use_distributed_optimizer=False)
    wrapped = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]
    found["wrapped"] = plop_dist.score(wrapped, _batches(rank // 2, 2), num_directions=4, exclude=())
    fresh()
    return found


def _check(ranks: list[dict[str, Scores]]) -> None:
    """Compare every rank's scores with one transformers process."""
    expected = plop_dist.score(tiny("qwen3", **FIELDS), _batches(0, 1), num_directions=4, exclude=())
    for found in ranks:
        for name, scores in found.items():
            assert [scores.parallel[axis] for axis in ("tp", "pp", "dp")] == list(LAYOUTS[name]), name
            assert [module.fqn for module in scores.modules] == [module.fqn for module in expected.modules], name
            for field in ("num_tokens", "gain", "baseline", "nfn"):
                got, true = (np.array([getattr(m, field) for m in s.modules]) for s in (scores, expected))
                np.testing.assert_allclose(got, true, rtol=1e-5, err_msg=f"{name} {field}")


@each_specification_rarely
def test_hosts_model_lists_are_scored_like_transformers(tmp_path: Path, specification: str) -> None:
    save_tiny("qwen3", tmp_path / "model", **FIELDS)
    ranks = run_ranks(4, specified, specification, _job, tmp_path)
    assert ranks[0].keys() == LAYOUTS.keys()
    _check(ranks)


@pytest.mark.skipif(not (OLDER / ".installed").is_file(), reason="`make test` installs the older megatron-core")
def test_the_oldest_megatron_core_is_scored_without_bridge(tmp_path: Path) -> None:
    # Bridge 0.6 does not import there, so the checkpoint comes from the present release; what is not sharded, the old
    # one reads from a file of its own.
    save_tiny("qwen3", tmp_path / "model", **FIELDS)
    run_ranks(4, _bridge_job, tmp_path)
    torch.save({}, tmp_path / "checkpoint" / "common.pt")
    ranks = run_ranks(4, _older_job, tmp_path, OLDER)
    assert ranks[0].keys() == PIPELINES.keys()
    _check(ranks)


def _predicting_job(rank: int) -> tuple[Scores, Scores]:
    """Score a chunk whose host trains it to predict two tokens, of a padded vocabulary, and the same without that."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer import TransformerConfig

    from plop_dist.backends.megatron import cpu

    cpu.prepare()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    own = TransformerConfig(
        num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, gated_linear_unit=True,
        add_bias_linear=False, use_cpu_initialization=True, gradient_accumulation_fusion=False,
        masked_softmax_fusion=False, persist_layer_norm=False, tensor_model_parallel_size=2, mtp_num_layers=1,
    )  # fmt: skip
    layers: Any = get_gpt_decoder_block_spec(own, use_transformer_engine=False)
    own.vocab_size = 125  # type: ignore[attr-defined]  # as Bridge's has it
    predicting: Any = get_gpt_mtp_block_spec(own, layers, use_transformer_engine=False)
    untied: dict[str, Any] = {"share_embeddings_and_output_weights": False, "position_embedding_type": "rope"}
    model: Any = GPTModel(own, layers, 256, 64, mtp_block_spec=predicting, **untied)  # rank 1 holds padding alone
    found = plop_dist.score([model], _batches(0, 1), num_directions=4, exclude=())
    assert model.mtp_process
    assert own.mtp_num_layers == 1
    model.mtp_process, own.mtp_num_layers = False, None
    expected = plop_dist.score([model], _batches(0, 1), num_directions=4, exclude=())
    around: Any = nn.Module()  # as a model that sees images has it
    around.config, around.language_model, around.tower = own, model, GPTModel(own, layers, 128, 64, **untied).decoder
    adapted = plop_dist.place(found, k=2).apply(around, r=4, lora_alpha=8)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(name.startswith("language_model.decoder.") and ".adapter." in name for name in trained)
    assert any(name.startswith("language_model.mtp.") for name, _ in adapted.named_parameters())
    return found, expected


def test_the_head_counts_no_padding_and_no_token_twice_where_several_are_predicted() -> None:
    for found, expected in run_ranks(2, _predicting_job):
        tokens = sum(len(row) for row in samples())
        assert {module.num_tokens for module in found.modules} == {tokens}
        (head,) = [module for module in found.modules if module.fqn == "lm_head"]
        assert head.out_features == 125
        assert [(m.fqn, m.gain) for m in found.modules] == [(m.fqn, m.gain) for m in expected.modules]
