"""What a backend says of itself: its layouts, its checks, its loader, its training engine, whose models it recognises.

One object per name, found through `registry.BACKENDS`; another installed package adds its own by an entry point.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from plop_dist.errors import ConfigError, LayoutError, PlopError
from plop_dist.registry import BACKENDS, load, names

if TYPE_CHECKING:
    from torch import nn

    from plop_dist.config.schema import Config
    from plop_dist.measure.protocols import ScorableModel

_WHAT = {
    "tp": "tensor parallelism",
    "pp": "pipeline",
    "dp": "data parallelism",
    "cp": "context parallelism",
    "ep": "expert parallelism",
    "sequence_parallel": "sequence parallelism",
    "zero_stage": "ZeRO",
}


@dataclass(frozen=True)
class Found:
    """A host's model that a backend has recognised.

    backend and wrapper: words for scores.json; roots: all its modules are below these. wrap(exclude) gives the
    ScorableModel; keep() is a context that puts the sharding back as it was. has_schedule: the framework runs the
    forward by a schedule of its own (pipelines), so that no function of the host's can.
    """

    backend: str
    wrapper: str
    roots: tuple[nn.Module, ...]
    wrap: Callable[[Sequence[str]], ScorableModel]
    keep: Callable[[], AbstractContextManager[Any]] = nullcontext
    zero_stage: int = 0
    sequence_parallel: bool = False
    has_schedule: bool = False


class BackendRecord:
    """A backend's record: subclass it, say what is different, and register one instance.

    The configuration asks it before anything is loaded, so its module imports no framework, and not torch either.

    name: the value of parallel.backend. summary, layouts, limits, hosts: for people; what it is, what it can shard,
    what it cannot, and which models of a host its find() knows. keys: the keys of the configuration's parallel section
    that it reads; any other must keep its default. shards_vocabulary: tensor parallelism cuts the embedding and the
    head too. runs_experts_together: the tokens of all experts of a layer are in memory at once.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    layouts: ClassVar[tuple[str, ...]] = ()
    limits: ClassVar[tuple[str, ...]] = ()
    hosts: ClassVar[str] = ""
    keys: ClassVar[tuple[str, ...]] = ("dp",)
    shards_vocabulary: ClassVar[bool] = False
    runs_experts_together: ClassVar[bool] = False

    def check(self, config: Config, source: str) -> None:
        """Raise ConfigError, naming `source`, for a layout that the backend does not know. Reads nothing."""
        parallel = config.parallel
        for key, field in type(parallel).model_fields.items():
            value = getattr(parallel, key)
            if key in ("backend", *self.keys) or value == field.default:
                continue
            others = [name for name in backends_with(key) if _takes(name, config)]
            remedy = f"use parallel.backend={' or '.join(others)}, or" if others else "set"
            raise ConfigError(
                f"{source}: parallel.{key} is {json.dumps(value)}, but parallel.backend '{self.name}' has no "
                f"{_WHAT.get(key, key)}; {remedy} parallel.{key}={json.dumps(field.default)}."
            )

    def check_model(self, hf_config: Any, config: Config) -> None:
        """Raise LayoutError where the layout does not divide the model, naming the nearest sizes that do.

        hf_config: the model's transformers configuration; no weights are there. Local.
        """

    def reads_singly(self, config: Config) -> bool:
        """Tell whether the layout takes samples that are more than a line of text: images beside it, two texts.

        Whether towers, encoders and cross-attention are observed as exactly as a decoder.
        """
        return False

    def takes_quantized(self, config: Config) -> bool:
        """Tell whether this layout can hold quantised weights: whole on every rank. Reads nothing."""
        return False

    def check_quantized(self, config: Config, where: str, kind: str) -> None:
        """Raise LayoutError, naming where the kind of quantisation comes from, for a layout that cannot hold it."""
        if not self.takes_quantized(config):
            raise LayoutError(
                f"{where} is {kind}, but parallel.backend '{self.name}' shards no quantised weights in this layout "
                f"({config.parallel.layout.product_text}, zero_stage {config.parallel.zero_stage}); use "
                "parallel.backend=transformers with tp 1, or deepspeed with tp 1, pp 1 and zero_stage up to 2."
            )

    def load(self, config: Config) -> ScorableModel:
        """Return the configured model as this rank sees it. torch.distributed is up if there are several ranks.

        Collective over the world. Raises ModelError, LayoutError and MissingExtraError.
        """
        raise NotImplementedError

    def find(self, model: Any) -> Found | None:
        """Return how a host's model is to be wrapped, or None if it is not one of this backend's. Local.

        model: a module, a list of several, or whatever else the host passes to plop_dist.score. Imports nothing unless
        it is this backend's.
        """
        return None

    def training_engine(self, config: Config) -> str | None:
        """Return which of registry.TRAINING_ENGINES trains adapters in this layout, None if none does.

        Or, from another package, the address of its own engine, "module:attribute".
        """
        return None


def check_singly(config: Config, what: str) -> None:
    """Raise LayoutError where rows have `what`, so that each is read by itself, and the layout does not take them."""
    backend = config.parallel.backend
    if not load(BACKENDS, backend).reads_singly(config):
        raise LayoutError(
            f"{config.data.path}: rows have {what}, which parallel.backend '{backend}' does not score in this layout; "
            "use parallel.backend=transformers, or deepspeed with parallel.tp=1 and parallel.pp=1."
        )


def _takes(backend: str, config: Config) -> bool:
    """Tell whether another backend takes this layout: what is offered instead was tried."""
    other = config.model_copy(update={"parallel": config.parallel.model_copy(update={"backend": backend})})
    try:
        load(BACKENDS, backend).check(other, "")
    except PlopError:
        return False
    return True


def backends_with(key: str) -> list[str]:
    """Return the backends that read a key of the parallel section; a package that is broken is passed over."""
    found = []
    for name in names(BACKENDS):
        with suppress(PlopError):
            if key in load(BACKENDS, name).keys:
                found.append(name)
    return found


def accepted() -> str:
    """Return what a host may pass to plop_dist.score, over all backends, as a sentence's end."""
    hosts = []
    for name in names(BACKENDS):
        with suppress(PlopError):
            hosts.append(load(BACKENDS, name).hosts)
    *first, last = filter(None, hosts)
    return f"pass {', '.join(first)}, or {last}"
