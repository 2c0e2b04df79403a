"""How the NFN moves while adapters train: W + BA is scored every train.track_nfn_every steps on calibration data."""

# T tokens, I in_features, O out_features, R rank

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from plop_dist.aggregate import score_modules
from plop_dist.backends.deepspeed import data_parallel_groups, gathered
from plop_dist.backends.hf_load import meta_model
from plop_dist.backends.hf_model import HFModel
from plop_dist.backends.hf_modules import LinearModule, find_linears
from plop_dist.backends.sites import Gather, LinearSite
from plop_dist.baseline import compute_baselines
from plop_dist.collect import Collector, add_totals
from plop_dist.config import Config
from plop_dist.data import plan_steps, select_rows, step_micro_batches, tokenize
from plop_dist.errors import ConfigError
from plop_dist.norms import Baseline, local_sq_norm
from plop_dist.protocols import LocalWeight, Recorder, Site
from plop_dist.reduce import Reducer
from plop_dist.rows import load_rows
from plop_dist.training.trl_common import Log
from plop_dist.types import Placement

_ADAPTER = "default"


class AdaptedSite:
    """A module that PEFT has wrapped: its gain is that of its own output, its weight W + scaling B A.

    linear: the original module's description, with PEFT's layer as `module`. gather: see LinearSite.
    """

    group = "tp"

    def __init__(self, linear: LinearModule, gather: Gather | None = None) -> None:
        self.module = linear.module
        self.projections = tuple(block.projection for block in linear.blocks)
        self._linear = linear
        self._gather: Callable[[list[nn.Parameter]], AbstractContextManager[Any]] = gather or (lambda _: nullcontext())

    def attach(self, recorder: Recorder) -> Callable[[], None]:
        """Install the hook and return the function that removes it. Collective where parameters are partitioned."""
        bias = self.module.base_layer.bias
        if bias is not None:
            # PEFT's layer ends after its base layer did, which by then has given its parameters back (ZeRO-3).
            with self._gather([bias]):
                bias = bias.detach().clone()

        def observe(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            y_TO = output if bias is None else output - bias
            out_sq = [local_sq_norm(block.take(y_TO)) for block in self._linear.blocks]
            recorder.record(self, recorder.sq_norm(args[0]), out_sq, leading_shape=args[0].shape[:-1])

        return self.module.register_forward_hook(observe, prepend=True).remove

    @contextmanager
    def weights(self) -> Iterator[Iterator[LocalWeight]]:
        """Give access to the effective weights. Collective where parameters are partitioned."""
        base = self.module.base_layer.weight
        A_RI, B_OR = self.module.lora_A[_ADAPTER].weight, self.module.lora_B[_ADAPTER].weight

        def effective() -> Iterator[LocalWeight]:
            weight_OI = (base.T if self._linear.is_transposed else base).detach().float()
            delta_OI = B_OR.detach().float() @ A_RI.detach().float()
            weight_OI = weight_OI + self.module.scaling[_ADAPTER] * delta_OI
            for block in self._linear.blocks:
                yield LocalWeight(block.projection, block.take_rows(weight_OI))

        with self._gather([base, A_RI, B_OR]):
            yield effective()


class NfnTracker:
    """Scores a PEFT model that trains in whole copies or under ZeRO, on the samples that placed its adapters."""

    def __init__(self, config: Config, placement: Placement, trainer: Any, tokenizer: Any) -> None:
        """trainer: of a PeftModel, with its engine made. Raises ConfigError, DataError."""
        expert = next((module for module in placement.chosen if module.storage == "expert_parameter"), None)
        if expert is not None:
            raise ConfigError(
                f"train.track_nfn_every cannot follow '{expert.fqn}', an expert kept in a 3-D parameter; leave it out, "
                "or set placement.experts=false."
            )
        self._config = config
        data = config.data
        self._samples = tokenize(select_rows(load_rows(data.path, data.split), data), data, tokenizer)
        self._pad_id = tokenizer.pad_token_id
        is_partitioned = config.parallel.zero_stage == 3
        gather = gathered if is_partitioned else None
        self._outer = trainer.model_wrapped if is_partitioned else trainer.model
        base = trainer.model.get_base_model()
        scored = {module.fqn: module for module in placement.source.modules}
        adapted: list[Site] = []
        frozen: list[Site] = []
        self._frozen_baselines: dict[str, Baseline] = {}
        with _unpartitioned(trainer.args):
            linears = find_linears(meta_model(config.model))
        for linear in linears:
            if not all(block.projection.fqn in scored for block in linear.blocks):
                continue
            real = replace(linear, module=base.get_submodule(linear.path))
            if hasattr(real.module, "lora_A"):
                adapted.append(AdaptedSite(real, gather))
                continue
            frozen.append(LinearSite(real, gather=gather))
            for block in linear.blocks:
                known = scored[block.projection.fqn]
                self._frozen_baselines[known.fqn] = Baseline(known.baseline, known.baseline_stderr)
        groups = data_parallel_groups(uniform=is_partitioned)
        with_head = any(module.type == "lm_head" for module in scored.values())
        options: dict[str, Any] = {"groups": groups, "with_head": with_head}
        self._model = HFModel(base, [*adapted, *frozen], call=self._outer if is_partitioned else None, **options)
        self._adapted = HFModel(base, adapted, **options)

    def score(self) -> dict[str, float]:
        """Return the mean NFN of each type as it is now. Collective over the world; the model keeps its mode."""
        was_training = self._outer.training
        self._outer.eval()
        scores = self._score()
        self._outer.train(was_training)
        return scores

    def _score(self) -> dict[str, float]:
        model, groups = self._model, self._model.groups
        reducer = Reducer(groups)
        projections = [projection for site in model.sites for projection in site.projections]
        names = [projection.fqn for site in self._adapted.sites for projection in site.projections]
        changed = compute_baselines(self._adapted, self._config.estimator, reducer, names)
        lengths = [len(sample) for sample in self._samples]
        plan = plan_steps(
            lengths, self._config.data.batch_size, groups.num_replicas, 1, uniform=groups.uniform_steps, in_order=False
        )
        collector = Collector(model, reducer)
        parts = []
        with collector.attached():
            for step in plan:
                # Padding on the right: a PEFT model's forward does not pass on positions, which then are the default.
                micro = step_micro_batches(self._samples, step, groups.replica, pad_id=self._pad_id, side="right")
                if micro:
                    parts.append(collector.step(micro))
        fqns = [projection.fqn for projection in projections]
        totals = reducer.merge_totals(add_totals(parts, collector.owned), fqns, len(self._samples))
        modules, _ = score_modules(projections, totals, {**self._frozen_baselines, **changed})
        by_type: dict[str, list[float]] = {}
        for module in modules:
            by_type.setdefault(module.type, []).append(module.nfn)
        return {name: math.fsum(values) / len(values) for name, values in sorted(by_type.items())}


def add_tracker(trainer: Any, config: Config, placement: Placement, tokenizer: Any, log: Log) -> None:
    """Have a TRL trainer log {"step", "nfn": {type: value}} before the first step and after every N-th, if wanted."""
    every = config.train.track_nfn_every
    if every is None:
        return

    class Track(TrainerCallback):
        """Scores once the engine exists, on every rank at the same steps."""

        tracker: NfnTracker

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.tracker = NfnTracker(config, placement, trainer, tokenizer)
            if state.global_step == 0:
                log({"step": 0, "nfn": self.tracker.score()})

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % every == 0:
                log({"step": state.global_step, "nfn": self.tracker.score()})

    trainer.add_callback(Track())


@contextmanager
def _unpartitioned(arguments: Any) -> Iterator[None]:
    """Build models whole for the length of a block: with ZeRO-3 arguments alive, transformers partitions every one."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if getattr(arguments, "hf_deepspeed_config", None) is not None:
            set_hf_deepspeed_config(arguments.hf_deepspeed_config)
