"""What a backend must offer and what the collector offers it: sites, recorder, scorable model."""

# T tokens, I in_features, O out_features, K directions

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from plop_dist.values.scores import Projection

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from plop_dist.measure.weight import Weight


class Part(enum.Enum):
    """How a per-token squared norm on this rank relates to the whole token's."""

    WHOLE = "whole"  # complete here (and the same on every rank of the group)
    PARTIAL = "partial"  # of a feature shard: the sum over the group is the whole one
    TOKENS = "tokens"  # complete, but only for this rank's contiguous share of the tokens (sequence parallel)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads on this rank. All tensors have the shape (batch, sequence) of input_ids.

    input_ids, attention_mask, position_ids: int64. sample_ids: int64, the calibration sample each token belongs to
    and -1 where the token is padding (or filler) and must not be counted. extra: what else the model's forward takes,
    by its names there, of any shape; tensors on the CPU.
    """

    input_ids: Tensor
    attention_mask: Tensor
    sample_ids: Tensor
    position_ids: Tensor | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_features(self) -> bool:
        """Whether the forward reads more than tokens: images, sounds, whatever is handed to it in real numbers."""
        return _has_reals(self.extra)


def _has_reals(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_reals, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_reals, value))
    return bool(getattr(value, "is_floating_point", bool)())


@dataclass(frozen=True)
class Routing:
    """Which routed expert a site is: `router` names the layer's router, `expert` is the index over all ranks."""

    router: str
    expert: int


class Recorder(Protocol):
    """Where sites leave what they see during a forward pass. Local: nothing here communicates."""

    def record(
        self,
        site: Site,
        in_sq_T: Tensor,
        out_sq_T: Sequence[Tensor],
        *,
        in_part: Part = Part.WHOLE,
        out_part: Part = Part.WHOLE,
        leading_shape: Sequence[int] | None = None,
        token_index_T: Tensor | None = None,
        routing: Routing | None = None,
    ) -> None:
        """Record one call of a site.

        in_sq_T: (T,) float32, ||z_t||^2 (or this rank's part of it); out_sq_T: per projection of the site (T,) float32,
        ||W z_t||^2 (or its part). leading_shape: the shape of z without its feature dimension, when T are the
        micro-batch's tokens. token_index_T: (T,) int64, for routed tokens known locally: index into the micro-batch's
        flattened tokens. routing: for experts fed by another rank; tokens follow from the recorded routing map in the
        order (source rank, token index).
        """
        ...

    def sq_norm(self, z_TI: Tensor) -> Tensor:
        """Return ||z_t||^2, (T,) float32, remembered for the next site that reads the very same tensor (q, k, v)."""
        ...

    def record_unreadable(self, site: Site) -> None:
        """Record that a site's module does not do W z on what it is given, so that it gets no score."""
        ...

    def record_routing(self, router: str, map_TE: Tensor) -> None:
        """Record which experts each local token goes to: (T_local, num_experts) bool, after capacity drops."""
        ...


@dataclass(frozen=True)
class LocalWeight:
    """This rank's part of one projection's weight.

    weight: (O_local, I_local). is_sharded: over the site's group, by rows (column-parallel) where in_index is None, by
    columns (row-parallel) where it is not. in_index: the global in_features that I_local stands for.
    """

    projection: Projection
    weight: Weight
    is_sharded: bool = False
    in_index: slice | Tensor | None = None


class WeightHolder(Protocol):
    """A parameter that several sites read their weights from: the experts' matrices in a 3-D one."""

    def opened(self) -> AbstractContextManager[Any]:
        """Hold the parameter whole for the length of a block, within which its sites' weights() gather nothing.

        Collective where parameters are partitioned.
        """
        ...


@runtime_checkable
class Site(Protocol):
    """One hooked module on this rank, holding one or more logical projections.

    `group` names the process group that shards or replicates its features ("tp", "etp").
    """

    projections: tuple[Projection, ...]
    group: str

    @property
    def holder(self) -> WeightHolder | None:
        """The parameter in which its weights lie beside those of other sites; None where it shares nothing."""
        ...

    def attach(self, recorder: Recorder) -> Callable[[], None]:
        """Install the observation and return the function that removes it. Touches activations only."""
        ...

    def weights(self) -> AbstractContextManager[Iterator[LocalWeight]]:
        """Give access to the local weights, one LocalWeight per projection, gathering released parameters if need be.

        Collective where parameters are partitioned (ZeRO-3, FSDP): every rank must enter, in the same order of sites.
        """
        ...


class PassingWeights(Protocol):
    """Weights that are there only while their modules run, as where they lie on disk between forward passes."""

    sites: Sequence[Site]

    def attach(self, take: Callable[[Site], None]) -> Callable[[], None]:
        """Have take(site) called in every forward pass while a site's weights() cost nothing; returns what ends it."""
        ...


@dataclass(frozen=True)
class Groups:
    """The process groups of the axes that matter here; a missing name means one rank on that axis.

    features: "tp" and "etp" (expert tensor parallel) -> group. routing: the group over which routed tokens are
    exchanged (Megatron's tp x ep), or None. copies: per feature group, (index, count) of this rank among the
    ranks that hold the same weights, by which baseline work is split. stage: a label for this rank's disjoint set of
    modules (pipeline stage).
    """

    features: Mapping[str, ProcessGroup] = field(default_factory=dict)
    routing: ProcessGroup | None = None
    copies: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    stage: str = "0"
    replica: int = 0  # which of num_replicas model replicas this rank belongs to: each reads its own samples
    num_replicas: int = 1
    uniform_steps: bool = False  # every replica must run the same number of forward passes (ZeRO-3, experts)
    alone: bool = False  # this rank scores by itself, whatever others there are


class Sited(Protocol):
    """The sites of a rank and the groups that they are sharded over: all that baselines are computed from."""

    @property
    def sites(self) -> Sequence[Site]:
        """One per hooked module, in the same order on every rank that holds the same modules."""
        ...

    @property
    def groups(self) -> Groups:
        """The process groups of the axes that matter here."""
        ...


class ScorableModel(Protocol):
    """A loaded model as one rank sees it; what a backend returns and what the plugin wraps a host's model in.

    It may have `passing`, PassingWeights: the baselines of those sites are then computed during the pass, not before.
    """

    sites: Sequence[Site]
    groups: Groups
    device: torch.device
    micro_batches_per_step: int  # how many micro-batches one forward() takes (pipeline depth), 1 without a pipeline

    def check(self, micro_batch: MicroBatch) -> None:
        """Raise DataError or ModelError where forward() could not keep this micro-batch's samples apart. Local.

        Asked of every micro-batch before the first pass: in a pass one rank's error would leave the others waiting.
        """
        ...

    def takes(self, key: str) -> bool | None:
        """Tell whether forward() hands this key of MicroBatch.extra to the model. Local.

        False: what the model computes cannot depend on it. None: that cannot be told.
        """
        ...

    def token_layout(self, micro_batch: MicroBatch) -> Tensor:
        """Return sample_ids in the order in which this rank's hidden states hold the tokens: (b, s), or (s, b).

        Or (b,), where every position of whatever a module sees in a row counts.
        Under sequence parallelism the whole sequence, under context parallelism this rank's part.
        """
        ...

    def routed_layout(self, micro_batch: MicroBatch) -> Tensor:
        """Return the sample id of each token that this rank's routers see: (T_local,) int64, as in record_routing.

        -1 for padding and for a token that another rank already counts. Asked for only where a router was recorded;
        the sums of routed experts add up over all ranks.
        """
        ...

    def forward(self, micro_batches: Sequence[MicroBatch], begin: Callable[[int], None]) -> None:
        """Run the model without gradients, hiding the pipeline schedule; collective over the replica's ranks.

        Calls begin(i) on this rank right before its own part of micro-batch i runs.
        """
        ...

    def watching(self) -> AbstractContextManager[Sequence[Projection]]:
        """Give what holds, after the block, the weights of no site that forward() has multiplied activations by in it.

        They are reported without a score; nothing, for a framework whose models hold no others. Local.
        """
        ...

    def release(self) -> None:
        """Give back what loading took (an engine's buffers); a wrapped host model gives back nothing."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return architecture, num_parameters (of the whole model) and dtype."""
        ...
