"""What the backend deepspeed can shard, how it is loaded and recognised."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from plop_dist.backends.hosts import is_a
from plop_dist.backends.record import BackendRecord, Found
from plop_dist.errors import ConfigError
from plop_dist.registry import needing_extras

if TYPE_CHECKING:
    from plop_dist.config.schema import Config
    from plop_dist.measure.protocols import ScorableModel


class DeepSpeed(BackendRecord):
    """ZeRO, AutoTP and PipelineModule, each in a file of its own."""

    name = "deepspeed"
    summary = "ZeRO, AutoTP or PipelineModule"
    layouts = (
        "dp at zero_stage 0 to 3; at 3 no rank holds the whole model",
        "tp, times dp, at zero_stage 0 or 1: AutoTP",
        "pp, times dp, at zero_stage 0 or 1: PipelineModule",
    )
    limits = (
        "no tp together with pp, and neither with zero_stage 2 or 3",
        "no tp for models with routed experts, nor over more ranks than there are key-value heads",
        "no pp but for plain stacks of decoder layers (Llama, Qwen, Mistral, OLMo and the like)",
    )
    hosts = "a DeepSpeed engine"
    keys = ("tp", "pp", "dp", "zero_stage")

    def check(self, config: Config, source: str) -> None:
        """Raise ConfigError for two kinds of sharding at once."""
        super().check(config, source)
        tp, pp, stage = config.parallel.tp, config.parallel.pp, config.parallel.zero_stage
        if (stage > 1 and (tp > 1 or pp > 1)) or (tp > 1 and pp > 1):
            raise ConfigError(
                f"{source}: parallel.backend deepspeed cannot combine tp {tp}, pp {pp} and zero_stage {stage}; use one "
                "of tp and pp, with zero_stage 0 or 1."
            )

    def check_model(self, hf_config: Any, config: Config) -> None:
        """Raise LayoutError where a rank would be left without heads or layers, or experts would be cut.

        Raises ModelError for a family that the pipeline does not take.
        """
        from plop_dist.backends.deepspeed.layout import check_pp, check_tp
        from plop_dist.backends.hf.layout import refuse_experts

        if config.parallel.tp > 1:
            refuse_experts(hf_config, config)
            check_tp(hf_config, config.parallel.tp)
        if config.parallel.pp > 1:
            check_pp(hf_config, config.parallel.pp)

    def reads_singly(self, config: Config) -> bool:
        """Take them at every ZeRO stage; AutoTP cuts fused linears of towers without regard to what they hold."""
        return config.parallel.tp == config.parallel.pp == 1

    def takes_quantized(self, config: Config) -> bool:
        """ZeRO does where it leaves the weights whole."""
        return config.parallel.tp == config.parallel.pp == 1 and config.parallel.zero_stage <= 2

    def load(self, config: Config) -> ScorableModel:
        """Return the loaded model. Raises ModelError or LayoutError. Collective over the world."""
        kind = "autotp" if config.parallel.tp > 1 else "pipeline" if config.parallel.pp > 1 else "zero"
        with needing_extras(f"parallel.backend '{self.name}'"):
            return importlib.import_module(f"plop_dist.backends.deepspeed.{kind}").load(config)

    def find(self, model: Any) -> Found | None:
        """Return an engine of any kind, or a module that zero.Init has partitioned."""
        if not is_a(model, "DeepSpeedEngine") and not _is_partitioned(model):
            return None
        from plop_dist.backends.deepspeed.host import find

        return find(model)

    def training_engine(self, config: Config) -> str:
        """Return TRL's trainer for ZeRO, our loops for the rest."""
        return "autotp" if config.parallel.tp > 1 else "pipeline" if config.parallel.pp > 1 else "trl"


def _is_partitioned(model: Any) -> bool:
    # zero.Init gives each parameter the number by which ZeRO-3 knows it.
    return callable(getattr(model, "parameters", None)) and any(hasattr(one, "ds_id") for one in model.parameters())


RECORD = DeepSpeed()
