"""What the backend transformers can shard, how it is loaded and recognised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plop_dist.backends.record import BackendRecord, Found
from plop_dist.registry import needing_extras

if TYPE_CHECKING:
    from plop_dist.config.schema import Config
    from plop_dist.measure.protocols import ScorableModel


class Transformers(BackendRecord):
    """Whole replicas, and transformers' own tensor parallelism."""

    name = "transformers"
    summary = "one process, whole replicas, or transformers' own tensor-parallel plan"
    layouts = (
        "one process",
        "dp: a whole model on every rank",
        "tp, times dp: the plan that comes with the model (tp_plan), whose sizes tp divides",
    )
    limits = (
        "no pipeline: a model must fit on one rank, or with tp its share of it",
        "no tp for models with routed experts, whose insides it would cut",
    )
    hosts = "a transformers model (plain, in DDP, or sharded by its own tp_plan)"
    keys = ("tp", "dp")

    def check_model(self, hf_config: Any, config: Config) -> None:
        """Raise LayoutError where tp does not divide the heads, there is no plan, or there are experts to be cut."""
        from plop_dist.backends.hf.layout import check_tp, refuse_experts

        if config.parallel.tp > 1:
            refuse_experts(hf_config, config)
            check_tp(hf_config, config.parallel.tp)

    def reads_singly(self, config: Config) -> bool:
        """Take them in every layout: a plan that cuts a tower says how."""
        return True

    def takes_quantized(self, config: Config) -> bool:
        """Whole replicas do."""
        return config.parallel.tp == 1

    def load(self, config: Config) -> ScorableModel:
        """Return the loaded model. Raises ModelError or LayoutError. Collective over the world."""
        with needing_extras(f"parallel.backend '{self.name}'"):
            from plop_dist.backends.hf.backend import load

            return load(config)

    def find(self, model: Any) -> Found | None:
        """Return any module that is called as transformers' are: the last to be asked.

        Raises ModelError for one that is not, LayoutError for sharding that hides the features.
        """
        from torch import nn

        if not isinstance(model, nn.Module):
            return None
        from plop_dist.backends.hf.host import find

        return find(model)

    def training_engine(self, config: Config) -> str:
        """Return TRL's trainer for whole replicas, our loop for its tensor parallelism."""
        return "tp_plan" if config.parallel.tp > 1 else "trl"


RECORD = Transformers()
