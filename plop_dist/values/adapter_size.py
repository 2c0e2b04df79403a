"""How many trainable parameters LoRA adapters on given projections have, counted as PEFT counts them."""

# P projections, N members of sets (a projection may be in several), G groups (one set's members in one holder)

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from typing import Any

import numpy as np

from plop_dist.values.names import expert_index
from plop_dist.values.scores import Projection

# Parts that together make up a whole fused linear (or fused expert parameter).
_WHOLE_SETS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_BITS = {name: 1 << bit for bit, name in enumerate(name for names in _WHOLE_SETS for name in names)}
_WHOLE_MASKS = tuple(sum(_BITS[name] for name in names) for names in _WHOLE_SETS)
_SHARED = ("fused", "expert_parameter")

RankOf = Callable[[Projection], int]


def num_trainable_parameters(
    modules: Iterable[Projection], rank_of: RankOf, left_out: Iterable[Projection] = ()
) -> int:
    """Return the number of elements of all A (r x in_features) and B (out_features x r).

    A fused linear or 3-D expert parameter all of whose parts are given carries one adapter, as under PEFT: one A for
    all its rows, at the highest rank of its parts; experts in a 3-D parameter have r rows of A and columns of B each.
    Taken in part, each projection counts by itself, as Megatron-Bridge's CanonicalLoRA adapts it.

    left_out: projections without a score (Scores.left_out): where they share a holder with given ones they are
    adapted with it, so they count; others do not.
    """
    sizes = AdapterSizes(modules, rank_of, left_out)
    return sizes.total(np.arange(sizes.num_projections))


def is_whole(parts: Iterable[Projection]) -> bool:
    """Tell whether projections of one holder make up all of it, whatever the number of experts."""
    found = 0
    for part in parts:
        found |= _bit(part)
    return bool(_is_whole(np.array([found]))[0])


class AdapterSizes:
    """The trainable parameters of adapters on many sets of the same projections, each set counted in linear time.

    Counts as num_trainable_parameters does, whose arguments it takes. A projection is named by its index in `modules`.
    """

    def __init__(self, modules: Iterable[Projection], rank_of: RankOf, left_out: Iterable[Projection] = ()) -> None:
        self._modules = tuple(modules)
        self._left_out = tuple(left_out)
        self.num_projections = len(self._modules)
        self._in_P = _integers([module.in_features for module in self._modules])
        self._out_P = _integers([module.out_features for module in self._modules])
        self._index_holders()
        self._read_ranks(rank_of)

    def with_ranks(self, rank_of: RankOf) -> AdapterSizes:
        """Return the sizes of the same projections at other ranks."""
        other = copy(self)
        other._read_ranks(rank_of)
        return other

    def total(self, members: np.ndarray) -> int:
        """Return the parameters of one set. members: (N,) distinct indices of projections, or (P,) bool."""
        indices = np.flatnonzero(members) if members.dtype == bool else members
        running = self.running(indices)
        return int(running[-1]) if len(running) else 0

    def totals(self, set_P: np.ndarray, num_sets: int) -> np.ndarray:
        """Return the parameters of disjoint sets: (num_sets,), int64. set_P: (P,), the set of each, -1 for none."""
        order = np.argsort(set_P, kind="stable")
        order = order[set_P[order] >= 0]
        running = np.append(self.running(order, set_P[order]), 0)
        ends = np.searchsorted(set_P[order], np.arange(num_sets), side="right")
        starts = np.searchsorted(set_P[order], np.arange(num_sets), side="left")
        return np.where(ends > starts, running[ends - 1], 0)

    def running(self, members: np.ndarray, set_N: np.ndarray | None = None) -> np.ndarray:
        """Return the parameters of a set after each of its members, in their order: (N,), int64.

        members: (N,) indices of projections, distinct within a set; set_N: (N,), ascending, for several sets at once.
        """
        delta_N = self._own_P[members]
        shared = np.flatnonzero(self._holder_P[members] >= 0)
        if len(shared):
            delta_N[shared] = self._shared_deltas(members[shared], None if set_N is None else set_N[shared])
        running_N = np.cumsum(delta_N)
        return running_N if set_N is None else running_N - _before_run(running_N, delta_N, set_N)

    def _index_holders(self) -> None:
        """Number the holders that several projections share, and sum up what is left out of each."""
        holders: dict[str, int] = {}
        numbers: dict[Any, int] = {}
        place_P = _places(self._modules, holders, numbers)
        num_known = len(holders)
        place_L = _places(self._left_out, holders, numbers)
        inside = np.flatnonzero((place_L[0] >= 0) & (place_L[0] < num_known))
        self._silent = tuple(self._left_out[index] for index in inside.tolist())
        self._holder_P, expert_P, type_P, self._bits_P = place_P
        self._silent_holder, expert_L, type_L, bits_L = place_L[:, inside]
        self._expert_P, self._is_silent_expert, first = _kinds(expert_P, expert_L)
        self._silent_experts = np.bincount(self._silent_holder[first], minlength=num_known)
        self._type_P, self._is_silent_type, first = _kinds(type_P, type_L)
        out_L = _integers([part.out_features for part in self._silent])
        self._silent_rows = np.zeros(num_known, dtype=np.int64)
        np.add.at(self._silent_rows, self._silent_holder[first], out_L[first])
        self._silent_bits = np.zeros(num_known, dtype=np.int64)
        np.bitwise_or.at(self._silent_bits, self._silent_holder, bits_L)

    def _read_ranks(self, rank_of: RankOf) -> None:
        self._rank_P = _integers([rank_of(module) for module in self._modules])
        self._own_P = self._rank_P * (self._in_P + self._out_P)
        rank_L = _integers([rank_of(part) for part in self._silent])
        own_L = rank_L * _integers([part.in_features + part.out_features for part in self._silent])
        self._silent_rank = np.zeros(len(self._silent_bits), dtype=np.int64)
        np.maximum.at(self._silent_rank, self._silent_holder, rank_L)
        self._silent_own = np.zeros(len(self._silent_bits), dtype=np.int64)
        np.add.at(self._silent_own, self._silent_holder, own_L)

    def _shared_deltas(self, members: np.ndarray, set_N: np.ndarray | None) -> np.ndarray:
        """Return what each member adds to its set where it lies in a shared holder: (N,), int64; may be negative.

        Members that share set and holder are one group, whose parameters are counted anew after each of them.
        """
        holder_N = self._holder_P[members]
        code_N = holder_N if set_N is None else set_N * len(self._silent_bits) + holder_N
        order = np.argsort(code_N, kind="stable")
        members, holder_N, code_N = members[order], holder_N[order], code_N[order]
        is_start = np.append(True, code_N[1:] != code_N[:-1])
        group_N = np.cumsum(is_start) - 1
        start_N = np.flatnonzero(is_start)[group_N]

        def so_far(amount_N: np.ndarray) -> np.ndarray:
            running = np.cumsum(amount_N)
            return running - (running - amount_N)[start_N]

        def is_first(kind_P: np.ndarray, is_silent: np.ndarray) -> np.ndarray:
            kind_N = kind_P[members]
            first = np.zeros(len(members), dtype=bool)
            first[np.unique(group_N * len(is_silent) + kind_N, return_index=True)[1]] = True
            return first & ~is_silent[kind_N]

        num_experts = self._silent_experts[holder_N] + so_far(is_first(self._expert_P, self._is_silent_expert))
        new_rows = np.where(is_first(self._type_P, self._is_silent_type), self._out_P[members], 0)
        rows = self._in_P[members][start_N] + self._silent_rows[holder_N] + so_far(new_rows)
        found = self._silent_bits[holder_N]
        for bit in _BITS.values():
            found = found | np.where(so_far(self._bits_P[members] & bit) > 0, bit, 0)
        # An offset that grows with the group keeps the running maximum inside it.
        offset_N = group_N * (int(self._rank_P.max()) + 1)
        rank = np.maximum.accumulate(self._rank_P[members] + offset_N) - offset_N
        rank = np.maximum(rank, self._silent_rank[holder_N])
        own = self._silent_own[holder_N] + so_far(self._own_P[members])
        cost_N = np.where(_is_whole(found), rank * num_experts * rows, own)
        before_N = np.where(is_start, 0, np.append(0, cost_N[:-1]))
        delta_N = np.empty(len(members), dtype=np.int64)
        delta_N[order] = cost_N - before_N
        return delta_N


def _before_run(running_N: np.ndarray, delta_N: np.ndarray, set_N: np.ndarray) -> np.ndarray:
    """Return the running total at the start of each member's set: (N,)."""
    is_start = np.append(True, set_N[1:] != set_N[:-1])[: len(set_N)]
    return (running_N - delta_N)[is_start][np.cumsum(is_start) - 1]


def _places(parts: Sequence[Projection], holders: dict[str, int], numbers: dict[Any, int]) -> np.ndarray:
    """Return numbers of each part's holder (-1: none that is shared), of expert and of type in it, and its bit: (4, N).

    holders, numbers: those that are known, to which new ones are added. An expert's and a type's number tell apart
    what lies in one holder only together with the holder's.
    """
    # Columns of numbers, not rows: tens of thousands of tuples would have the garbage collector look at everything.
    holder_N, expert_N, type_N, bit_N = [], [], [], []
    of_type: dict[str, tuple[int, int]] = {}
    for part in parts:
        kind = of_type.get(part.type)
        if kind is None:
            kind = of_type[part.type] = numbers.setdefault(part.type, len(numbers)), _bit(part)
        is_shared = part.storage in _SHARED
        holder_N.append(holders.setdefault(part.holder, len(holders)) if is_shared else -1)
        expert_N.append(numbers.setdefault(expert_index(part.fqn), len(numbers)) if is_shared else 0)
        type_N.append(kind[0])
        bit_N.append(kind[1])
    place_4N = np.array([holder_N, expert_N, type_N, bit_N], dtype=np.int64)
    place_4N[1:3] += place_4N[0] << 32
    return place_4N


def _kinds(code_P: np.ndarray, code_L: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number codes from 0 on: those of the projections, which numbers are left out as well, and where each is first."""
    codes, number = np.unique(np.concatenate([code_P, code_L]), return_inverse=True)
    is_silent = np.zeros(len(codes), dtype=bool)
    is_silent[number[len(code_P) :]] = True
    return number[: len(code_P)], is_silent, np.unique(code_L, return_index=True)[1]


def _bit(part: Projection) -> int:
    return _BITS.get(part.type.removeprefix("experts."), 0)


def _is_whole(found: np.ndarray) -> np.ndarray:
    """Tell of each set of bits whether every whole set that it touches is in it."""
    whole = np.ones(len(found), dtype=bool)
    for mask in _WHOLE_MASKS:
        whole &= ((found & mask) == 0) | ((found & mask) == mask)
    return whole


def _integers(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)
