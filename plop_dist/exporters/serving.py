"""What vLLM and SGLang would not apply of an adapter that PEFT trains, as warnings that name its module types.

Both load such an adapter; whether each of its weights is used depends on which linears the server packs into one, which
it folds into its kernels, and what its loader looks for. What a server's source does not promise is said as well, as
not known: an adapter that is dropped answers like the base model, and nobody notices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from plop_dist.exporters.holders import Holder, Targets, modules_above
from plop_dist.values.names import expert_index, natural_key

_TOWERS = "whether towers and projectors get adapters depends on its class of the model; where not, they are dropped"
_ROUTER = "how it reads a router's weight depends on its class of the model"
_RECURRENT = "how it packs the linears of state-space and linear-attention layers depends on its class of the model"
_HEAD = "its class of the model must list the head among its embedding modules"
_KIND = "it has no rule for weights of this kind"
_EXPERTS_IN_PART = "it takes adapters of routed experts only where gate, up and down have one"


@dataclass(frozen=True)
class Adapter:
    """An adapter as a server finds it: r of its configuration, what has weights in it, and what there is besides."""

    rank: int
    holders: Sequence[Holder]
    known_paths: Sequence[str]

    def experts_of(self, holder: Holder) -> str | None:
        """Return the path of the routed experts that a weight belongs to, or None."""
        first = holder.projections[0]
        if first.storage == "expert_parameter" and first.role is None:
            return holder.path.rpartition(".")[0]
        index = expert_index(holder.path)
        return None if index is None else holder.path.rpartition(f".{index}.")[0]

    def has_all_of(self, path: str) -> bool:
        """Tell whether every known weight below this path is adapted."""
        return path not in self._above_unadapted

    def names_beside(self, holder: Holder) -> set[str]:
        """Return the last components of what is adapted in the same module, the holder's own among them."""
        return self._names_in[holder.path.rpartition(".")[0]]

    @cached_property
    def has_experts(self) -> bool:
        """Whether the model has routed experts, adapted or not."""
        return any(".experts." in path for path in self.known_paths)

    # Each is looked up for every holder, and a model may have thousands.
    @cached_property
    def _above_unadapted(self) -> set[str]:
        rest = set(self.known_paths).difference(holder.path for holder in self.holders)
        return {above for path in rest for above in modules_above(path)}

    @cached_property
    def _names_in(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for holder in self.holders:
            found.setdefault(holder.path.rpartition(".")[0], set()).add(_name(holder))
        return found


@dataclass(frozen=True)
class Finding:
    """Why a weight is not applied, or (is_known false) is not known to be."""

    why: str
    is_known: bool


class Server(Protocol):
    """A server of adapters: its name with the version that was read, and what it does with one weight and the whole."""

    @property
    def name(self) -> str: ...  # noqa: D102
    def finding(self, holder: Holder, adapter: Adapter) -> Finding | None:
        """Return what speaks against this weight being applied, or None."""
        ...

    def refusals(self, adapter: Adapter) -> Iterator[str]:
        """Yield, as whole sentences, why the adapter is refused as it is."""
        ...


class VLLM:
    """vLLM wraps every linear of its own class of the model, packed ones part by part, each module at its own rank."""

    name = "vLLM 0.32"
    ranks = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
    default_rank = 16

    def finding(self, holder: Holder, adapter: Adapter) -> Finding | None:
        """See Server."""
        first, experts = holder.projections[0], adapter.experts_of(holder)
        doubt = _doubt(holder)
        if doubt is not None:
            return Finding(doubt, is_known=False)
        if experts is not None and not adapter.has_all_of(experts):
            return Finding(_EXPERTS_IN_PART, is_known=True)
        if first.storage == "expert_parameter":
            return Finding(
                "its class of the model must keep experts as 3-D parameters; others refuse the adapter unless started "
                "with --enable-mixed-moe-lora-format and asked with is_3d_lora_weight",
                is_known=False,
            )
        if _name(holder) == "kv_b_proj":
            return Finding("it folds this weight into its attention when it loads the model", is_known=True)
        if first.type == "lm_head":
            return Finding(_HEAD, is_known=False)
        return None

    def refusals(self, adapter: Adapter) -> Iterator[str]:
        """See Server."""
        rank = max(adapter.rank, *(holder.rank for holder in adapter.holders))
        enough = next((value for value in self.ranks if value >= rank), None)
        if enough is None:
            yield f"{self.name} refuses the adapter: its highest rank is {rank}, and no --max-lora-rank is over " + (
                f"{self.ranks[-1]}. Serve the model with the adapter merged into it, or place with a lower rank."
            )
        elif rank > self.default_rank:
            yield f"{self.name} refuses the adapter, whose highest rank is {rank}, unless it is started with " + (
                f"--max-lora-rank {enough}."
            )


class SGLang:
    """SGLang has one buffer for each packed linear, of a size that it knows by the linear's name, at one rank."""

    name = "SGLang 0.5"
    # Each packed linear's parts, and those that its loader looks for first: the others are found beside them alone.
    packed = (
        (("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj")),
        (("gate_proj", "up_proj"), ("gate_proj",)),
        (("q_a_proj", "kv_a_proj_with_mqa"), ("q_a_proj", "kv_a_proj_with_mqa")),
    )
    single = frozenset({"qkv_proj", "gate_up_proj", "o_proj", "down_proj", "q_b_proj", "kv_b_proj", "lm_head"})
    mlp = frozenset({"gate_up_proj", "gate_proj", "up_proj", "down_proj"})

    def finding(self, holder: Holder, adapter: Adapter) -> Finding | None:
        """See Server."""
        name, experts = _name(holder), adapter.experts_of(holder)
        if holder.rank != adapter.rank:
            return Finding(f"it takes one rank for all modules, which here is r = {adapter.rank}", is_known=True)
        if experts is not None:
            return self._of_expert(holder, adapter, experts)
        doubt = _doubt(holder)
        if doubt is not None:
            return Finding(doubt, is_known=False)
        for parts, first in self.packed:
            if name in parts:
                if not adapter.names_beside(holder).issuperset(first):
                    return Finding(
                        f"it packs {_listed(parts)} into one, and finds their adapters only where {_listed(first)} "
                        f"{'has' if len(first) == 1 else 'have'} one",
                        is_known=True,
                    )
                break
        else:
            if name not in self.single:
                return Finding("its classes of models must say how large a module of this name is", is_known=False)
        if name in self.mlp and adapter.has_experts:
            return Finding("beside routed experts it may take an MLP's size for another's", is_known=False)
        return None

    def refusals(self, adapter: Adapter) -> Iterator[str]:
        """See Server. SGLang takes its highest rank from the adapters that it is started with."""
        yield from ()

    @staticmethod
    def _of_expert(holder: Holder, adapter: Adapter, experts: str) -> Finding | None:
        if holder.is_parameter:
            return Finding("it reads routed experts one by one, not as a 3-D parameter", is_known=True)
        return None if adapter.has_all_of(experts) else Finding(_EXPERTS_IN_PART, is_known=True)


SERVERS: tuple[Server, ...] = (VLLM(), SGLang())


def serving_warnings(targets: Targets, rank: int) -> tuple[str, ...]:
    """Return what each server would not apply, or is not known to, one sentence for each reason.

    rank: the adapter configuration's r.
    """
    adapter = Adapter(rank, targets.holders, targets.known_paths)
    warnings: list[str] = []
    for server in SERVERS:
        warnings += server.refusals(adapter)
        types: dict[Finding, set[str]] = {}
        for holder in targets.holders:
            finding = server.finding(holder, adapter)
            if finding is not None:
                types.setdefault(finding, set()).update(part.type for part in holder.projections)
        for finding, names in sorted(types.items(), key=lambda entry: not entry[0].is_known):
            warnings.append(_sentence(server, finding, _listed(sorted(names, key=natural_key))))
    return tuple(warnings)


def _doubt(holder: Holder) -> str | None:
    """Return what no server promises for modules of every class."""
    first = holder.projections[0]
    if first.part != "language":
        return _TOWERS
    if first.role is not None:
        return _ROUTER if first.role == "router" else _RECURRENT
    return None if first.storage in ("linear", "fused", "expert_parameter") else _KIND


def _sentence(server: Server, finding: Finding, types: str) -> str:
    if finding.is_known:
        return f"{server.name} does not apply {types}: {finding.why}. Serve the model with the adapter merged into it."
    return f"{server.name} is not known to apply {types}: {finding.why}. Compare its log-probabilities with PEFT's."


def _name(holder: Holder) -> str:
    """Return the name of the module that holds the weight, in the module that it lies in."""
    return holder.path.removesuffix(".weight").rpartition(".")[2]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
