"""What torch itself can have sharded in a host's job, and how it is recognised; it loads nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from plop_dist.backends.record import BackendRecord, Found
from plop_dist.errors import ConfigError
from plop_dist.registry import BACKENDS, names

if TYPE_CHECKING:
    from plop_dist.config.schema import Config


class Torch(BackendRecord):
    """A host's FSDP2 model."""

    name = "torch"
    summary = "FSDP2 in a job that already runs: plop_dist.score(model, batches)"
    layouts = ("fully_shard over all ranks (HSDP, too), the whole model last",)
    limits = (
        "no loading: parallel.backend=torch is refused",
        "no FSDP1, and no FSDP2 combined with tensor or pipeline parallelism",
    )
    hosts = "a transformers model sharded by fully_shard"
    keys = ()

    def check(self, config: Config, source: str) -> NoReturn:
        """Raise ConfigError: there is nothing here that loads a model."""
        others = [name for name in names(BACKENDS) if name != self.name]
        raise ConfigError(
            f"{source}: parallel.backend '{self.name}' loads no model, it only recognises one in a job that already "
            f"runs (plop_dist.score(model, batches)); use parallel.backend={' or '.join(others)}."
        )

    def find(self, model: Any) -> Found | None:
        """Return a module that was given to fully_shard. Raises ModelError for FSDP1, LayoutError for half a model."""
        from torch import nn

        if not isinstance(model, nn.Module):
            return None
        from plop_dist.backends.torch import fsdp

        return fsdp.find(model)


RECORD = Torch()
