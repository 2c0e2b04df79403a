"""What a Ray cluster has, what of it is free, and who holds the rest."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import state  # what single nodes have free, and drivers: nothing public says it

_COUNTED = ("CPU", "GPU")
_STATIC = re.compile(r"node_[0-9a-f]{40,}|")  # what a monitor that may not start nodes calls those that are there
_HOLDERS_WAIT_S = 5


@dataclass(frozen=True)
class Node:
    """A living node: its id, its name for people, and its resources, in all and free."""

    id: str
    name: str
    total: Mapping[str, float]
    free: Mapping[str, float]

    def room(self, per_worker: Mapping[str, float], *, when_idle: bool = False) -> int:
        """Return how many workers fit onto it now, or if nobody held anything."""
        has = self.total if when_idle else self.free
        return min(int(has.get(name, 0.0) / amount + 1e-6) for name, amount in per_worker.items())


def living_nodes() -> list[Node]:
    """Return the nodes of the cluster that this process has joined."""
    free = state.available_resources_per_node()
    return [
        Node(
            id=node["NodeID"],
            name=_name(node["NodeManagerHostname"], node["NodeManagerAddress"]),
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def autoscales() -> bool | None:
    """Tell whether the cluster starts nodes by itself: whether its nodes have types that an autoscaler gave them.

    None where nothing watches over its nodes yet: on Kubernetes the autoscaler comes up beside the head, later than it.
    """
    types: set[str] = set()
    is_watched = False
    with suppress(Exception):  # what either version of the autoscaler leaves is for Ray's own tools
        from ray.experimental.internal_kv import _internal_kv_get

        report = json.loads(_internal_kv_get("__autoscaling_status") or b"{}").get("autoscaler_report") or {}
        is_watched = bool(report)
        types.update((report.get("node_type_mapping") or {}).values())
        pending = [node[1] for node in report.get("pending_nodes") or []]
        types.update(report.get("active_nodes") or {}, report.get("pending_launches") or {}, pending)
    with suppress(Exception):
        from ray.autoscaler.v2.sdk import get_cluster_status

        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        types.update(node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes))
    grows = any(not _STATIC.fullmatch(name) for name in types)
    return grows if grows or is_watched else None


def holders() -> list[str]:
    """Return who holds resources, by driver, as far as Ray's dashboard knows: actors, not tasks."""
    held: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(_COUNTED, 0.0))
    with suppress(Exception):  # a Ray without a dashboard cannot be asked
        from ray.util.state import list_actors

        alive: list[Any] = list_actors(
            address=ray.get_runtime_context().gcs_address,
            filters=[("state", "=", "ALIVE")],
            detail=True,
            timeout=_HOLDERS_WAIT_S,
            raise_on_missing_output=False,
        )
        for actor in alive:
            for name in _COUNTED:
                held[actor.job_id][name] += (actor.required_resources or {}).get(name, 0.0)
    drivers = {job["JobID"]: job for job in state.jobs()}
    own = ray.get_runtime_context().get_job_id()
    found = []
    for job, amounts in sorted(held.items()):
        if job != own and any(amounts.values()):
            driver = drivers.get(job, {})
            where = f"process {driver.get('DriverPid', '?')} on {driver.get('DriverIPAddress', '?')}"
            found.append(f"job {job} ({where}) holds {amounts_text(amounts)}")
    return found


def nodes_text(nodes: Iterable[Node], per_worker: Mapping[str, float]) -> str:
    """Return what each node has and has free of what workers need."""
    texts = [
        f"{node.name} has {amounts_text({name: node.total.get(name, 0.0) for name in per_worker})}, free "
        f"{amounts_text({name: node.free.get(name, 0.0) for name in per_worker})}"
        for node in nodes
    ]
    return "; ".join(texts) or "no node is there"


def amounts_text(amounts: Mapping[str, float]) -> str:
    """Return resources as people say them.

    >>> amounts_text({"CPU": 2.0, "GPU": 1.0})
    '2 CPUs and 1 GPU'
    """
    said = [f"{amount:g} {name}{'' if amount == 1 else 's'}" for name, amount in amounts.items()]
    return " and ".join(said)


def _name(hostname: str, address: str) -> str:
    return f"{hostname} ({address})" if hostname and hostname != address else address
