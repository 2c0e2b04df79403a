"""How the NFN moves while adapters train: W + BA is scored every train.track_nfn_every steps on calibration data."""

# T tokens, I in_features, O out_features

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plop_dist.config.schema import Config
from plop_dist.data.rows import load_rows
from plop_dist.data.samples import plan_steps, select_rows, step_micro_batches, tokenize
from plop_dist.errors import ConfigError
from plop_dist.measure.aggregate import score_modules
from plop_dist.measure.baseline import compute_baselines
from plop_dist.measure.collectives import Reducer
from plop_dist.measure.collector import Collector
from plop_dist.measure.norms import Baseline
from plop_dist.measure.protocols import Groups, LocalWeight, Recorder, ScorableModel, Site
from plop_dist.measure.sums import add_totals
from plop_dist.measure.weight import Gather, Weight
from plop_dist.training.adapters.placed import scaling_of
from plop_dist.training.adapters.shards import AdapterShard
from plop_dist.values.names import expert_index
from plop_dist.values.placement import Placement


class AdaptedSite:
    """A site whose module an adapter wraps: the gain is that of both together, the weight W + scaling B A.

    site: observes the wrapper and holds W. shards: this rank's adapters by the path of a projection or, in a fused
    module of which PEFT adapts the whole, of the module. gather: gives whole A and B where they are partitioned.
    """

    def __init__(
        self, site: Any, shards: Mapping[str, AdapterShard], scaling: float, gather: Gather | None = None
    ) -> None:
        self.projections, self.group, self.holder = site.projections, site.group, site.holder
        self._site, self._shards, self._scaling = site, shards, scaling
        self._gather: Gather = gather or nullcontext

    def attach(self, recorder: Recorder) -> Callable[[], None]:
        """Install the site's own hook, which then records as this site; returns what removes it."""
        return self._site.attach(_RecordAs(self, recorder))

    @contextmanager
    def weights(self) -> Iterator[Iterator[LocalWeight]]:
        """Give access to the effective weights. Collective over the adapters' groups, and where partitioned."""
        deltas = []
        for block in self._site.blocks:
            own = self._shards.get(block.projection.fqn)
            shard = own or self._shards.get(getattr(self._site, "path", ""))
            if shard is None:  # the rest of a fused linear, of which only a part is adapted
                deltas.append(None)
                continue
            with self._gather([shard.A, shard.B]):
                product_OI = shard.local_product()
            deltas.append(self._scaling * (product_OI if own else block.take_rows(product_OI)))
        with self._site.weights() as weights:
            yield (
                weight if delta_OI is None else replace(weight, weight=_plus(weight.weight, delta_OI))
                for weight, delta_OI in zip(weights, deltas, strict=True)
            )


def _plus(weight: Weight, delta_OI: Tensor) -> Weight:
    """Return W + delta, in float32, by rows as W is read."""
    delta_OI = delta_OI.to(weight.device)
    read = lambda start, stop: weight.read(start, stop).float() + delta_OI[start:stop]  # noqa: E731
    return Weight(weight.shape, torch.float32, weight.device, read)


@dataclass(frozen=True)
class _RecordAs:
    """A recorder that puts another site in the place of the one that observes."""

    site: Site
    recorder: Recorder

    def record(self, site: Site, *args: Any, **kwargs: Any) -> None:
        self.recorder.record(self.site, *args, **kwargs)

    def record_unreadable(self, site: Site) -> None:
        self.recorder.record_unreadable(self.site)

    def sq_norm(self, z_TI: Tensor) -> Tensor:
        return self.recorder.sq_norm(z_TI)


@dataclass(frozen=True)
class _Adapted:
    """The adapted part of a model: all that compute_baselines reads of it."""

    sites: Sequence[Site]
    groups: Groups


class NfnTracker:
    """Scores the model that trains, as it is then, on the samples that placed its adapters."""

    def __init__(
        self,
        config: Config,
        placement: Placement,
        tokenizer: Any,
        model: ScorableModel,
        shards: Sequence[AdapterShard],
        modules: Sequence[nn.Module],
        gather: Gather | None = None,
    ) -> None:
        """model: its sites observe what training calls; they are replaced by those that are scored.

        shards: this rank's adapters. modules: what switches between training and evaluation. gather: see AdaptedSite.
        Raises ConfigError, DataError. Collective over the world.
        """
        check(placement)
        data = config.data
        self._config, self._model, self._modules = config, model, modules
        self._samples = tokenize(select_rows(load_rows(data.path, data.split), data), data, tokenizer)
        self._pad_id = tokenizer.pad_token_id
        scored = {module.fqn: module for module in placement.source.modules}
        by_fqn = {shard.fqn: shard for shard in shards}
        sites: list[Site] = []
        adapted: list[Site] = []
        for site in model.sites:
            names = [projection.fqn for projection in site.projections]
            if not all(name in scored for name in names):
                continue
            if any(name in by_fqn for name in [*names, getattr(site, "path", "")]):
                site = AdaptedSite(site, by_fqn, scaling_of(placement), gather)
                adapted.append(site)
            sites.append(site)
        model.sites = sites
        self._adapted = _Adapted(adapted, model.groups)
        self._reducer = Reducer(model.groups)
        self._projections = self._reducer.merge_projections(sites)
        changed = self._reducer.gather_objects([p.fqn for site in adapted for p in site.projections], "adapted modules")
        self._changed = sorted({fqn for part in changed for fqn in part})
        self._frozen = {name: Baseline(known.baseline, known.baseline_stderr) for name, known in scored.items()}

    def score(self) -> dict[str, float]:
        """Return the mean NFN of each type as it is now. Collective over the world; the modules keep their mode."""
        modes = [module.training for module in self._modules]
        for module in self._modules:
            module.eval()
        scores = self._score()
        for module, mode in zip(self._modules, modes, strict=True):
            module.train(mode)
        return scores

    def _score(self) -> dict[str, float]:
        model, groups, reducer = self._model, self._model.groups, self._reducer
        changed = compute_baselines(self._adapted, self._config.estimator, reducer, self._changed)
        plan = plan_steps(
            [len(sample) for sample in self._samples],
            self._config.data.batch_size,
            groups.num_replicas,
            model.micro_batches_per_step,
            uniform=groups.uniform_steps,
            in_order=False,
        )
        collector = Collector(model, reducer)
        parts = []
        with collector.attached():
            for step in plan:
                # Padding on the right: a PEFT model's forward does not pass on positions, which then are the default.
                micro = step_micro_batches(self._samples, step, groups.replica, pad_id=self._pad_id, side="right")
                if micro:
                    parts.append(collector.step(micro))
        fqns = [projection.fqn for projection in self._projections]
        totals = reducer.merge_totals(add_totals(parts, collector.owned), fqns, np.arange(len(self._samples)))
        modules, _ = score_modules(self._projections, totals, {**self._frozen, **changed})
        by_type: dict[str, list[float]] = {}
        for module in modules:
            by_type.setdefault(module.type, []).append(module.nfn)
        return {name: math.fsum(values) / len(values) for name, values in sorted(by_type.items())}


def check(placement: Placement) -> None:
    """Raise ConfigError for adapters that cannot be followed: those of routed experts."""
    for module in placement.chosen:
        if module.storage == "expert_parameter" or expert_index(module.fqn) is not None:
            raise ConfigError(
                f"train.track_nfn_every cannot follow '{module.fqn}', a routed expert; leave it out, or set "
                "placement.experts=false."
            )


def with_head(placement: Placement) -> bool:
    """Tell whether the LM head was scored, and hence is followed."""
    return any(module.type == "lm_head" for module in placement.source.modules)
