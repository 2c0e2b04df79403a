"""The plugin in a job that already runs: the scores of one process, and a host that does not notice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard

import plop_dist
from plop_dist.backends.hf.load import load_tokenizer
from plop_dist.backends.torch.fsdp import as_sharded
from plop_dist.config.loading import parse_config
from plop_dist.data.samples import tokenize
from plop_dist.errors import ConfigError, DataError, ModelError, WorkerError
from plop_dist.launch.rank import score
from plop_dist.rundir.stages import Stages
from plop_dist.values.scores import Scores
from tests.installed import needs_bridge
from tests.models import random_tokens, save_tiny, tiny
from tests.plugin import hosts as plugin_hosts
from tests.spawn import run_ranks

TEXTS = (
    "one short row",
    "a row that is quite a bit longer than that",
    "the",
    "and then another one",
    "in the end it rests",
)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2", tmp_path_factory.mktemp("plugin") / "model")  # its qkv has a bias


@pytest.fixture(scope="module")
def reference(directory: Path) -> tuple[Scores, list[list[int]]]:
    """The scores that the command line gives in one process, and the samples they are of."""
    rows = directory.with_name("rows.jsonl")
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = parse_config(
        {
            "run_dir": str(directory.with_name("run")),
            "model": {"name_or_path": str(directory), "dtype": "float32"},
            "data": {"path": str(rows), "max_length": 24, "batch_size": 2},
            "parallel": {"backend": "transformers"},
        }
    )
    scores = score(Stages(config), lambda kind, **fields: None)
    return scores, tokenize([{"text": text} for text in TEXTS], config.data, load_tokenizer(config.model))


def padded(samples: Sequence[Sequence[int]], side: str = "right") -> dict[str, Tensor]:
    longest = max(map(len, samples)) + 1
    ids, mask = torch.zeros(len(samples), longest, dtype=torch.int64), torch.zeros(len(samples), longest)
    for row, sample in enumerate(samples):
        at = slice(0, len(sample)) if side == "right" else slice(longest - len(sample), longest)
        ids[row, at], mask[row, at] = torch.tensor(sample), 1
    return {"input_ids": ids, "attention_mask": mask.bool(), "labels": ids}


def assert_same(found: Scores, expected: Scores) -> None:
    assert [module.fqn for module in found.modules] == [module.fqn for module in expected.modules]
    for one, other in zip(found.modules, expected.modules, strict=True):
        assert one.num_tokens == other.num_tokens, one.fqn
        assert (one.gain, one.baseline, one.nfn) == pytest.approx(
            (other.gain, other.baseline, other.nfn), rel=TOLERANCE
        ), one.fqn
    assert found.samples is not None
    assert expected.samples is not None
    assert found.samples.gain_total == pytest.approx(expected.samples.gain_total, rel=TOLERANCE)


def test_a_plain_loop_gets_the_command_lines_scores_and_goes_on_unchanged(
    directory: Path, reference: tuple[Scores, list[list[int]]]
) -> None:
    expected, samples = reference

    def train(call: Any) -> list[Tensor]:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            model = plugin_hosts.load(directory)
            model.model.layers[0].eval()  # a host that freezes a part keeps it so
            return plugin_hosts._train(model, torch.optim.SGD(model.parameters(), lr=0.05), call)
        finally:
            torch.distributed.destroy_process_group()

    found = []
    batches = [padded(samples[:3], "left"), padded(samples[3:])]
    with_calls = train(lambda model: found.append(plop_dist.score(model, plugin_hosts.drawing(batches))))
    without = train(lambda model: None)
    assert all(map(torch.equal, with_calls, without))
    assert_same(found[0], expected)
    assert found[1].modules != found[0].modules  # one step later the weights are others
    assert found[0].model.name_or_path == str(directory)
    assert found[0].parallel["tp"] == 1
    assert plop_dist.place(found[0], k=2).module_types == plop_dist.place(expected, k=2).module_types


def test_sample_ids_group_rows_and_keep_the_hosts_numbers() -> None:
    model, tokens = tiny("llama"), random_tokens(3, 6)
    ids = torch.tensor([[70, 70, 70, 5, 5, -1]]).expand(3, 6)
    scores = plop_dist.score(model, [{"input_ids": tokens, "sample_ids": ids}], num_directions=4, name="mine")
    assert scores.samples is not None
    assert scores.samples.sample_ids.tolist() == [5, 70]
    assert scores.samples.num_tokens[0].tolist() == [6, 9]
    by_row = plop_dist.score(model, [{"input_ids": tokens[:2]}, {"input_ids": tokens[2:]}], num_directions=4)
    assert by_row.samples is not None
    assert by_row.samples.num_tokens[0].tolist() == [6, 6, 6]
    one_id_per_row = {"input_ids": tokens, "sample_ids": torch.tensor([9, 9, 2])}
    again = plop_dist.score(model, [one_id_per_row], num_directions=4, baseline="closed_form", seed=3)
    assert again.samples is not None
    assert again.samples.num_tokens[0].tolist() == [6, 12]
    assert (again.estimator["baseline"], again.estimator["seed"], scores.model.name_or_path) == (
        "closed_form",
        3,
        "mine",
    )


def test_packed_rows_are_scored_like_rows_of_their_own() -> None:
    model, first, second = tiny("llama"), random_tokens(1, 5, seed=1), random_tokens(1, 7, seed=2)
    apart = plop_dist.score(model, [{"input_ids": first}, {"input_ids": second}], num_directions=4)
    packed = {
        "input_ids": torch.cat([first, second], dim=1),
        "position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None],
        "sample_ids": torch.tensor([[0] * 5 + [1] * 7]),
    }
    assert_same(plop_dist.score(model, [packed], num_directions=4), apart)
    with pytest.raises(DataError, match=r"packed rows .* and padding"):
        plop_dist.score(model, [{**packed, "attention_mask": torch.tensor([[1] * 11 + [0]])}])


def _score_with_one_that_sees_too_much(rank: int) -> str:
    """Give rank 1 alone packed rows with padding, between which transformers makes no difference."""
    batches = [{"input_ids": random_tokens(1, 4)}] * 2
    if rank == 1:
        places = {"position_ids": torch.tensor([[0, 1, 0, 1]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
        batches[1] = {**batches[1], **places}
    with pytest.raises(DataError) as caught:
        plop_dist.score(tiny("llama"), batches)
    return str(caught.value)


@pytest.mark.slow
def test_what_one_rank_cannot_run_ends_all_of_them_before_the_first_pass() -> None:
    first, second = run_ranks(2, _score_with_one_that_sees_too_much)
    assert first == f"rank 1: {second}"
    assert second.startswith("a micro-batch has packed rows")


def test_padding_may_hold_what_is_no_token() -> None:
    model, tokens = tiny("llama"), random_tokens(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    expected = plop_dist.score(model, [{"input_ids": tokens, "attention_mask": mask}], num_directions=4)
    for filler in (-100, 10**6):
        filled = tokens.where(mask != 0, filler)
        assert_same(plop_dist.score(model, [{"input_ids": filled, "attention_mask": mask}], num_directions=4), expected)


def test_a_host_may_have_given_its_model_more_tokens_than_the_configuration_knows() -> None:
    model: Any = tiny("llama")
    model.resize_token_embeddings(model.config.vocab_size + 3)
    model.config.vocab_size -= 3
    largest = torch.full((1, 4), model.config.vocab_size + 2)
    assert plop_dist.score(model, [{"input_ids": largest}], num_directions=4).modules
    with pytest.raises(DataError, match="which is no token"):
        plop_dist.score(model, [{"input_ids": largest + 1}])
    model.get_input_embeddings = _raise_not_implemented
    with pytest.raises(DataError, match="which is no token"):
        plop_dist.score(model, [{"input_ids": largest}])


def _raise_not_implemented() -> None:
    raise NotImplementedError


def test_masks_of_floats_and_one_row_of_positions_are_taken_as_models_take_them() -> None:
    tokens, mask = random_tokens(2, 6), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    plain = plop_dist.score(tiny("llama"), [{"input_ids": tokens, "attention_mask": mask}], num_directions=4)
    other = {"input_ids": tokens, "attention_mask": mask.float(), "position_ids": torch.arange(6)[None]}
    assert_same(plop_dist.score(tiny("llama"), [other], num_directions=4), plain)


def test_exclude_names_types_and_paths() -> None:
    batches = [{"input_ids": random_tokens(1, 5)}]
    scores = plop_dist.score(tiny("llama"), batches, num_directions=4, exclude=("mlp.*", "layers.1.self_attn.q_proj"))
    fqns = {module.fqn for module in scores.modules}
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    paths = {f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in names}
    assert fqns == {"lm_head", *paths} - {"model.layers.1.self_attn.q_proj"}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compiled_and_wrapped_blocks_are_scored_under_their_names(family: str) -> None:
    batches = [{"input_ids": random_tokens(2, length)} for length in (6, 9)]
    expected = plop_dist.score(tiny(family), batches, num_directions=4)
    warm, replaced, wrapped = tiny(family), tiny(family), tiny(family)
    for layer in warm.model.layers:
        layer.compile(backend="eager")
    with torch.no_grad():  # a compiled graph runs without the hooks that are attached after it
        warm(input_ids=batches[0]["input_ids"], attention_mask=torch.ones(2, 6, dtype=torch.int64), use_cache=False)
    for index in range(2):
        replaced.model.layers[index] = torch.compile(replaced.model.layers[index], backend="eager")
        wrapped.model.layers[index].mlp = checkpoint_wrapper(wrapped.model.layers[index].mlp)
    for model in (warm, replaced, wrapped):
        assert_same(plop_dist.score(model, batches, num_directions=4), expected)


def test_an_error_in_the_forward_pass_leaves_no_hook(directory: Path) -> None:
    model: Any = plugin_hosts.load(directory)
    broken = model.model.layers[1].mlp
    broken.forward = lambda z: z[:, :, :3] @ z
    with plugin_hosts._watched(model), pytest.raises(WorkerError, match=r"model\.layers\.1\.self_attn\.o_proj"):
        plop_dist.score(model, [{"input_ids": random_tokens(2, 6)}], num_directions=4)
    with plugin_hosts._watched(model), pytest.raises(WorkerError, match="reading batches failed: KeyError") as caught:
        plop_dist.score(model, ({"input_ids": {}[key]} for key in "a"))
    assert isinstance(caught.value.__cause__, KeyError)


class _NoIds(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels


class _NoLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.embedding(input_ids)


TOKENS = torch.ones(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty on every rank"),
        ([{"tokens": TOKENS}], r"batches\[0\] has no input_ids \(its keys: tokens\)"),
        ([{"input_ids": TOKENS}, {"input_ids": TOKENS[0]}], r"batches\[1\]\['input_ids'\] has shape \(4,\)"),
        ([{"input_ids": TOKENS.float()}], r"is torch.float32, expected integers"),
        ([{"input_ids": TOKENS.bool()}], r"is torch.bool, expected integers"),
        ([{"input_ids": TOKENS.to(torch.complex64)}], r"is torch.complex64, expected integers"),
        ([{"input_ids": TOKENS}, {"input_ids": 128 * TOKENS}], r"batches\[1\].* holds 128, .*\(the model has 128\)"),
        ([TOKENS], r"batches\[0\] is a Tensor"),
        (None, "batches is a NoneType, expected an iterable"),
        ([{"input_ids": -100 * TOKENS}], r"\['input_ids'\] holds -100, which is no token"),
        ([{"input_ids": TOKENS, "attention_mask": TOKENS - 1e9}], r"\['attention_mask'\] is torch.float32, expected"),
        ([{"input_ids": TOKENS, "attention_mask": TOKENS[:1]}], r"\['attention_mask'\] has shape \(1, 4\)"),
        ([{"input_ids": TOKENS, "sample_ids": TOKENS}, {"input_ids": TOKENS}], "every batch or in none"),
        ([{"input_ids": TOKENS, "attention_mask": 0 * TOKENS}], "nothing but padding"),
    ],
)
def test_batches_that_cannot_be_scored(batches: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        plop_dist.score(tiny("llama"), batches)


def test_models_that_cannot_be_scored() -> None:
    batches = [{"input_ids": TOKENS}]
    with pytest.raises(ModelError, match="cannot read a dict"):
        plop_dist.score({}, batches)
    with pytest.raises(ModelError, match="2 modules without a Megatron linear"):
        plop_dist.score([nn.Linear(2, 2), nn.Linear(2, 2)], batches)
    with pytest.raises(ModelError, match="takes no input_ids and no attention_mask"):
        plop_dist.score(_NoIds(), batches)
    with pytest.raises(ModelError, match="no linear module"):
        plop_dist.score(_NoLinear(), batches)
    with pytest.raises(ConfigError, match=r"num_directions: .* the value is 0"):
        plop_dist.score(tiny("llama"), batches, num_directions=0)
    with pytest.raises(ConfigError, match="baseline"):
        plop_dist.score(tiny("llama"), batches, baseline="none")


def _job(rank: int, hosts: list[str], directory: Path, samples: list[list[int]]) -> dict[str, Any]:
    """Train each host with and without calls; the first rank has three batches, the second one, then none."""
    out: dict[str, Any] = {}
    torch.set_num_threads(1)
    for host in hosts:
        train = getattr(plugin_hosts, f"train_{host}")
        every = [padded(samples[:1]), padded(samples[1:3], "left"), padded(samples[3:4]), padded(samples[4:])]
        is_data_parallel = host in ("ddp", "fsdp2", "fsdp2_whole", "zero3")
        shares = [[every[:3], every[3:]][rank], [every, []][rank]] if is_data_parallel else [every, every]
        found: list[Scores] = []

        def call(model: Any, shares: Any = shares, found: list[Scores] = found) -> None:
            found.append(plop_dist.score(model, plugin_hosts.drawing(shares[len(found)])))
            if len(found) == 1:
                _fail_once(model)

        with_calls, without = train(directory, call), train(directory, lambda model: None)
        assert len(with_calls) == len(without)
        assert all(map(torch.equal, with_calls, without)), f"{host}: training goes on differently"
        out[host] = found
    return out


def _fail_once(model: Any) -> None:
    """Score what cannot be scored on every rank, and on one alone, and in a pass that fails: nothing may be left."""
    modules = [module for chunk in (model if isinstance(model, list) else [model]) for module in chunk.modules()]
    for bad in ([1, 2], [[1, 9999]]):
        with pytest.raises(DataError):
            plop_dist.score(model, [{"input_ids": bad}])
    batches = ({"input_ids": random_tokens(1, 4 + _raise_if(number and not dist.get_rank()))} for number in range(2))
    with pytest.raises(WorkerError, match="rank 0: reading batches failed: _UnpicklableError: why"):
        plop_dist.score(model, batches)
    if not isinstance(model, list):
        norm = [module for module in modules if type(module).__name__.endswith("RMSNorm")][-2]
        handle = norm.register_forward_pre_hook(lambda *_: _raise_if(True))
        with pytest.raises(WorkerError, match=r"scoring step 1 .* _UnpicklableError: why"):
            plop_dist.score(model, [{"input_ids": random_tokens(1, 4)}])
        handle.remove()


class _UnpicklableError(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.state = lambda: text


def _raise_if(condition: Any) -> int:
    if condition:
        raise _UnpicklableError("why")
    return 0


def _fail_alone(rank: int) -> str | None:
    """Leave as_sharded by an error on rank 1 only, with units that were whole and no longer are."""
    model: Any = tiny("llama")
    for part in (*model.model.layers, model):
        fully_shard(part)
    model.set_reshard_after_backward(False)
    model(input_ids=random_tokens(1, 5), labels=random_tokens(1, 5)).loss.backward()
    try:
        with as_sharded(model):
            if rank == 1:
                model.reshard()
                _raise_if(True)
    except _UnpicklableError as error:
        return str(error)
    return None


@pytest.mark.slow
def test_a_rank_that_fails_alone_gathers_nothing_on_its_way_out() -> None:
    assert run_ranks(2, _fail_alone) == [None, "why"]


def _check(ranks: list[dict[str, list[Scores]]], expected: Scores, parallel: dict[str, dict[str, Any]]) -> None:
    for found in ranks:
        for host, (first, second) in found.items():
            assert_same(first, expected)
            assert parallel[host].items() <= first.parallel.items()
            assert first.types == ranks[0][host][0].types
            assert second.modules == ranks[0][host][1].modules
            assert second.modules[0].num_tokens == expected.modules[0].num_tokens


@pytest.mark.slow
def test_two_ranks_equal_one_process(directory: Path, reference: tuple[Scores, list[list[int]]]) -> None:
    expected, samples = reference
    parallel = {
        "ddp": {"backend": "transformers", "dp": 2},
        "fsdp2": {"wrapper": "fsdp2", "dp": 2},
        "fsdp2_whole": {"wrapper": "fsdp2", "dp": 2},
        "hf_tp": {"wrapper": "tp_plan", "tp": 2, "dp": 1},
        "zero3": {"backend": "deepspeed", "dp": 2, "zero_stage": 3},
        "autotp": {"backend": "deepspeed", "wrapper": "autotp", "tp": 2, "dp": 1, "zero_stage": 1},
    }
    _check(run_ranks(2, _job, list(parallel), directory, samples), expected, parallel)


@needs_bridge
@pytest.mark.slow
def test_megatron_at_tp2_pp2_equals_one_process(directory: Path, reference: tuple[Scores, list[list[int]]]) -> None:
    expected, samples = reference
    parallel = {"megatron": {"backend": "megatron", "tp": 2, "pp": 2, "dp": 1, "cp": 1, "ep": 1}}
    _check(run_ranks(4, _job, ["megatron"], directory, samples), expected, parallel)
