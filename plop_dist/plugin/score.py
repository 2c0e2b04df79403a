"""Scores of a model inside a job that already runs: found, wrapped, scored, and left exactly as it was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from plop_dist import ranks
from plop_dist.backends.hf.own_modules import refuse_adapted_parameters
from plop_dist.backends.hosts import bare, check_forward
from plop_dist.backends.record import Found
from plop_dist.config.loading import parse_section
from plop_dist.config.schema import EstimatorConfig, PlacementConfig
from plop_dist.errors import ConfigError, LayoutError, ModelError
from plop_dist.measure.aggregate import check_weights
from plop_dist.measure.collectives import Reducer
from plop_dist.measure.protocols import Groups, ScorableModel, Site
from plop_dist.measure.run import Pass, score_model
from plop_dist.plugin.detect import find
from plop_dist.plugin.heads import without_heads
from plop_dist.plugin.host_batches import share
from plop_dist.plugin.host_state import undisturbed
from plop_dist.plugin.own_forward import Forward, Mask, OwnForward, RawReader
from plop_dist.plugin.reading import Reader
from plop_dist.plugin.replicas import check_replicas
from plop_dist.values.names import path_matches
from plop_dist.values.sample_totals import SampleTotals
from plop_dist.values.scores import Scores


def score(
    model: Any,
    batches: Iterable[Any],
    *,
    num_directions: int = 64,
    baseline: str = "control_variate",
    seed: int = 0,
    exclude: Sequence[str] = ("lm_head",),
    name: str | None = None,
    num_samples: int | None = None,
    forward: Forward | None = None,
    mask: Mask | None = None,
    local: bool = False,
) -> Scores:
    """Return the scores of a host's model, equal on every rank. Collective over the world.

    model: a transformers model (plain, in DDP, under fully_shard, zero.Init or its own tensor parallelism), a DeepSpeed
    engine (any ZeRO stage, AutoTP, PipelineEngine), or Megatron's list of model chunks. batches: dictionaries with
    input_ids (b, s) and, as needed, attention_mask (default: all real), position_ids (default: places among the real
    tokens) and sample_ids, (b, s) or (b,), -1 where a token does not count (default: each row is a sample); what else
    the model's forward takes reaches it as it is, and what cannot be told is refused. Each data-parallel rank passes
    its own share, also an empty one; the tensor-, pipeline- and context-parallel ranks of one replica pass the same.
    num_directions, baseline, seed: as in the configuration's estimator section.
    exclude: types, paths or patterns that are not scored (a fused linear only when all its projections match); with
    lm_head among them no logits are computed where the framework allows it. name: what scores.json calls the model.
    num_samples: reading ends once the batches of all replicas hold about as many (whole batches).

    forward: the host's own, called as forward(model, batch), for models that are not called as transformers' are;
    batches may then hold anything. mask(batch): which positions are tokens, (b, s); without it those of input_ids and
    attention_mask are, or, where there are none, every position that a linear sees. local: score on this rank alone,
    whatever others there are.

    Training mode, hooks, gradients, buffers, random states and gathered parameters are as before, also after an error.
    Raises ConfigError, ModelError, LayoutError and DataError for input that cannot be scored, on every rank, and
    WorkerError when the model fails on the way.
    """
    options = {"num_directions": num_directions, "baseline": baseline, "seed": seed}
    estimator = parse_section(EstimatorConfig, options, source="score()")
    if not local:
        _refuse_without_group()
    ranks.let_gloo_end()
    found = find(model)
    _check_call(found, forward, mask, local)
    for root in found.roots:
        refuse_adapted_parameters(root)
    with undisturbed(found.roots), found.keep():
        scorable = found.wrap(exclude)
        if local:
            scorable.groups = Groups(alone=True)
        scorable.sites = _not_excluded(without_heads(scorable), exclude)
        share_of_rank = None if num_samples is None else -(-num_samples // scorable.groups.num_replicas)
        reader: Reader | RawReader
        if forward is None:
            reader = Reader(scorable.takes, _vocab_size(found.roots), _pad_id(found.roots), share_of_rank)
        else:
            scorable, reader = OwnForward(scorable, model, forward), RawReader(mask, share_of_rank)
        reducer = Reducer(scorable.groups)
        check_replicas(found.roots, scorable.groups, reducer)
        per_step = scorable.micro_batches_per_step
        host = share(lambda: reader.read(batches), scorable.groups, per_step, reducer)
        _check_sites(scorable, reducer)
        scores = score_model(
            scorable,
            Pass(
                num_steps=len(host.steps),
                micro_batches=lambda step: host.steps[step],
                num_samples=len(host.sample_ids),
                samples_after=lambda step: host.samples_after[step],
            ),
            estimator=estimator,
            placement=PlacementConfig(exclude=list(exclude)),
            info={
                "model": {"name_or_path": name or _name(found.roots[0]), **scorable.describe()},
                "data": {"source": None},
                "parallel": _parallel(found, scorable, reducer),
            },
        )
    check_weights(scores)
    return scores.with_samples(_renamed(scores.samples, host.sample_ids))


def _refuse_without_group() -> None:
    """Raise LayoutError where other ranks were started and none of them can be spoken to yet."""
    said = ranks.said_ranks()
    if said is not None and said[1] > 1 and not (dist.is_available() and dist.is_initialized()):
        raise LayoutError(
            f"score() was called before the process group exists, though {said[0]}={said[1]} says that there are "
            f"{said[1]} ranks: each would score its own share and choose for itself; call "
            "torch.distributed.init_process_group first (accelerate's PartialState(), deepspeed.init_distributed() and "
            "Trainer's TrainingArguments do), or pass local=True to score on this rank alone."
        )


def _check_call(found: Found, forward: Forward | None, mask: Mask | None, local: bool) -> None:
    """Raise ModelError where the model is not called as score() would, ConfigError for options that do not fit it."""
    if forward is None:
        if mask is not None:
            raise ConfigError("score() got mask= without forward=; a mask of its own belongs to a forward of its own.")
        if not found.has_schedule:
            for root in found.roots:
                check_forward(bare(getattr(root, "module", root))[0])
    elif found.has_schedule:
        raise ConfigError(
            f"score() got forward=, but a model of {found.backend} ({found.wrapper}) is run by that framework's own "
            "schedule; leave forward= out."
        )
    if local and found.wrapper not in ("plain", "ddp"):
        raise ConfigError(
            f"score() got local=True, but the model is sharded ({found.wrapper}): no rank can score it alone; leave "
            "local= out."
        )


def _vocab_size(roots: Sequence[nn.Module]) -> int | None:
    """Return how many token ids the model takes: transformers' configuration says it, or Megatron's model.

    A host may have given its model an embedding of more rows than the configuration knows of.
    """
    for module in (module for root in roots for module in root.modules()):
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "get_text_config"):
            known = (getattr(config.get_text_config(), "vocab_size", None), _num_embeddings(module))
            return max(filter(None, known), default=None)
        if isinstance(size := getattr(module, "vocab_size", None), int):
            return size
    return None


def _pad_id(roots: Sequence[nn.Module]) -> int | None:
    configs = (getattr(module, "config", None) for root in roots for module in root.modules())
    known = (getattr(config, "pad_token_id", None) for config in configs)
    return next((one for one in known if isinstance(one, int)), None)


def _num_embeddings(module: Any) -> int | None:
    try:
        return getattr(module.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):  # a family of which transformers does not know where they are
        return None


def _not_excluded(sites: Sequence[Site], exclude: Sequence[str]) -> list[Site]:
    def is_excluded(site: Site) -> bool:
        return bool(site.projections) and all(
            any(projection.type == pattern or path_matches(projection.fqn, pattern) for pattern in exclude)
            for projection in site.projections
        )

    return [site for site in sites if not is_excluded(site)]


def _check_sites(model: ScorableModel, reducer: Reducer) -> None:
    num_projections = sum(len(site.projections) for site in model.sites)
    if not any(reducer.gather_objects(num_projections, "count of modules")):
        raise ModelError("the model has no linear module to score that exclude does not name; check model and exclude.")


def _parallel(found: Found, model: ScorableModel, reducer: Reducer) -> dict[str, Any]:
    """Return the `parallel` part of scores.json. Collective over the world."""
    groups = model.groups
    has_peers = dist.is_available() and dist.is_initialized() and not groups.alone
    world_size = dist.get_world_size() if has_peers else 1
    tp, dp = reducer.size("tp"), groups.num_replicas
    pp = len(set(reducer.gather_objects(groups.stage, "count of pipeline stages")))
    return {
        "backend": found.backend,
        "wrapper": found.wrapper,
        "tp": tp,
        "pp": pp,
        "dp": dp,
        "cp": world_size // (tp * pp * dp),
        "ep": 1 if groups.routing is None else dist.get_world_size(groups.routing),
        "sequence_parallel": found.sequence_parallel,
        "zero_stage": found.zero_stage,
    }


def _name(root: Any) -> str:
    while True:
        own = getattr(getattr(root, "config", None), "_name_or_path", None)
        if isinstance(own, str) and own:
            return own
        inner = getattr(root, "module", None)
        if inner is None:
            return type(root).__name__
        root = inner


def _renamed(samples: SampleTotals | None, ids: Any) -> SampleTotals | None:
    """Return the per-sample sums under the host's own sample ids."""
    if samples is None:
        return None
    return SampleTotals(
        samples.fqns, ids[samples.sample_ids], samples.gain_total, samples.num_tokens, samples.num_skipped
    )
