"""What the backend megatron can shard, how it is loaded and recognised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plop_dist.backends.hosts import is_a
from plop_dist.backends.record import BackendRecord, Found
from plop_dist.errors import ConfigError, LayoutError
from plop_dist.registry import needing_extras
from plop_dist.values.versions import versions

if TYPE_CHECKING:
    from plop_dist.config.schema import Config
    from plop_dist.measure.protocols import ScorableModel


class Megatron(BackendRecord):
    """Megatron-core, loaded by Megatron-Bridge."""

    name = "megatron"
    summary = "Megatron-core, loaded through Megatron-Bridge: every axis, in any combination"
    layouts = (
        "tp, with sequence_parallel or without, times pp, times dp",
        "ep: routed experts over the ranks of tp, cp and dp",
        "cp, where Transformer Engine is installed",
    )
    limits = (
        "no families but those that were compared with transformers: more with Transformer Engine than without",
        "no tp that does not divide heads, key-value heads and MLP, nor pp the layers, nor ep the experts",
        "of models that read more than text the language model alone, and no training",
        "no tensor parallelism inside experts, and no packed rows under Transformer Engine's attention or a sliding "
        "window",
    )
    hosts = "Megatron's list of model chunks"
    keys = ("tp", "pp", "dp", "cp", "ep", "sequence_parallel")
    shards_vocabulary = True
    runs_experts_together = True

    def check(self, config: Config, source: str) -> None:
        """Raise ConfigError for sequence parallelism without tensor parallelism."""
        super().check(config, source)
        if config.parallel.sequence_parallel and config.parallel.tp == 1:
            raise ConfigError(
                f"{source}: parallel.sequence_parallel is true, but parallel.tp is 1; it shares the tokens out among "
                "tensor-parallel ranks: set parallel.tp to 2 or more, or parallel.sequence_parallel=false."
            )

    def check_model(self, hf_config: Any, config: Config) -> None:
        """Raise ModelError for a family not known to be right here, LayoutError where an axis does not divide."""
        from plop_dist.backends.megatron.layout import check_layout

        if "megatron-bridge" in versions():  # what it builds depends on what is installed
            from plop_dist.backends.megatron.families import check_family

            check_family(hf_config, config)
        check_layout(hf_config, config.parallel)

    def load(self, config: Config) -> ScorableModel:
        """Return the loaded model. Raises MissingExtraError, LayoutError and ModelError. Collective over the world."""
        with needing_extras(f"parallel.backend '{self.name}'"):
            from plop_dist.backends.megatron.backend import load

            return load(config)

    def find(self, model: Any) -> Found | None:
        """Return a list of chunks, or one chunk, of which any holds a module of Megatron's.

        Raises LayoutError for any model, also one of transformers', that Megatron's ways of FSDP have sharded.
        """
        from torch import nn

        chunks = model if isinstance(model, list) else [model]
        if not all(isinstance(chunk, nn.Module) for chunk in chunks):
            return None
        _refuse_fsdp(chunks)
        if not any(map(_is_megatron, chunks)):
            return None
        from plop_dist.backends.megatron.backend import wrap
        from plop_dist.backends.megatron.chunks import unwrap

        return Found(
            self.name, "megatron", tuple(chunks), lambda exclude: wrap(chunks, exclude),
            sequence_parallel=bool(unwrap(chunks[0]).config.sequence_parallel), has_schedule=True,
        )  # fmt: skip

    def training_engine(self, config: Config) -> str:
        """Return our loop over Megatron's schedules."""
        return "megatron"


def _is_megatron(chunk: Any) -> bool:
    return any(cls.__module__.startswith("megatron.core.") for cls in type(chunk).__mro__) or any(
        is_a(module, "MegatronModule") for module in chunk.modules()
    )


def _refuse_fsdp(chunks: list[Any]) -> None:
    """Raise LayoutError for Megatron-FSDP and Megatron's wrapper of FSDP2: weights are whole in no rank's forward."""
    for module in (module for chunk in chunks for module in chunk.modules()):
        home = next((cls.__module__ for cls in type(module).__mro__ if cls.__module__.startswith(_FSDP)), None)
        if home is not None:
            raise LayoutError(
                f"the model is sharded by Megatron's FSDP ({type(module).__name__} of {home}), whose shards score() "
                "and placement.apply() do not know; call them before it is wrapped (in Megatron-Bridge's recipes: "
                "cfg.peft = plop_dist.MegatronBridgePeft(batches)), or wrap it in Megatron's DistributedDataParallel."
            )


# Where the classes live that wrap a module, or that one is given on the spot: megatron-core's, and the same code as a
# package of its own, which takes models of transformers.
_FSDP = ("megatron.core.distributed.fsdp.", "megatron.core.distributed.torch_fully_sharded_", "megatron_fsdp.")

RECORD = Megatron()
