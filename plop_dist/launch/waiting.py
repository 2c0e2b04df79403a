"""Waits until a Ray cluster has room for the ranks, and says for what, what there is, and who holds it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from ray.autoscaler.sdk import request_resources

from plop_dist.config.schema import Config
from plop_dist.errors import LayoutError, WorkerError
from plop_dist.launch.asked import answered, head_address, listens
from plop_dist.launch.capacity import Node, amounts_text, autoscales, holders, living_nodes, nodes_text
from plop_dist.launch.rank_places import Places, find_places

_POLL_S = 1.0
_PATIENCE_S = 3.0  # what has just ended gives back what it held a moment later
_NODES_SHOWN = 16


def wait_for_room(config: Config, per_worker: Mapping[str, float], notify: Any, *, until: float, again: bool) -> Places:
    """Return where the ranks can run now, once there is room for all of them.

    until: by time.monotonic(). again: the workers have run before, and what they had may come back. Raises LayoutError
    at once for more than a cluster has that does not grow, and WorkerError where there is no room in time, or its head
    no longer answers.
    """
    world_size, group_size = config.parallel.world_size, config.parallel.tp
    began, said, asked = time.monotonic(), "", False
    try:
        while True:
            nodes = answered(living_nodes)
            found = find_places({node.id: node.room(per_worker) for node in nodes}, world_size, group_size)
            if found is not None:
                _say_torn(found, nodes, group_size, notify)
                return found
            now, grows = time.monotonic(), answered(autoscales)
            if not again and grows is False and _exceeds(nodes, per_worker, world_size):
                raise LayoutError(
                    f"{_wanted(config, per_worker)}, which is more than the Ray cluster has: "
                    f"{_shown(nodes, per_worker)}; {_remedy(per_worker)}, or add nodes."
                )
            if grows and not asked:
                asked = True
                answered(partial(request_resources, bundles=[dict(per_worker)] * world_size))
            if grows or now >= min(began + _PATIENCE_S, until):  # what is asked of the cluster is said at once
                text = answered(partial(_missing, config, per_worker, nodes, grows))
                if now >= until:
                    raise WorkerError(
                        f"{text}; waited for cluster.start_timeout_s ({config.cluster.start_timeout_s:g} s)."
                    )
                if text != said:
                    notify("phase", text=f"{text}; waiting up to {until - now:.0f} s (cluster.start_timeout_s)")
                    said = text
            time.sleep(min(_POLL_S, max(0.0, until - now)))
    finally:
        if asked and listens(head_address()):
            request_resources(bundles=[])


def _exceeds(nodes: list[Node], per_worker: Mapping[str, float], world_size: int) -> bool:
    return any(
        amount * world_size > sum(node.total.get(name, 0.0) for node in nodes) + 1e-6
        for name, amount in per_worker.items()
    )


def _missing(config: Config, per_worker: Mapping[str, float], nodes: list[Node], grows: bool | None) -> str:
    """Return what cannot be placed and why."""
    if grows:
        why = "the cluster is asked to start nodes"
    elif grows is None:
        why = "Ray does not say yet whether the cluster starts nodes by itself"
    elif sum(node.room(per_worker, when_idle=True) for node in nodes) < config.parallel.world_size:
        why = f"the nodes could not take them if all were idle: {_remedy(per_worker)}, or add nodes"
    else:
        why = "; ".join(holders()) or "Ray does not say who holds the rest"
    return f"{_wanted(config, per_worker)}, and there is no room for them: {_shown(nodes, per_worker)}; {why}"


def _wanted(config: Config, per_worker: Mapping[str, float]) -> str:
    each = amounts_text(per_worker)
    return f"{config.parallel.world_size} workers need {each} each ({config.parallel.layout.product_text})"


def _shown(nodes: list[Node], per_worker: Mapping[str, float]) -> str:
    more = f"; and {len(nodes) - _NODES_SHOWN} nodes more" if len(nodes) > _NODES_SHOWN else ""
    return nodes_text(nodes[:_NODES_SHOWN], per_worker) + more


def _remedy(per_worker: Mapping[str, float]) -> str:
    return f"lower {' or '.join(f'cluster.{name.lower()}s_per_worker' for name in per_worker)} or the parallel sizes"


def _say_torn(found: Places, nodes: list[Node], group_size: int, notify: Any) -> None:
    if found.torn:
        names = {node.id: node.name for node in nodes}
        first = found.torn[0] * group_size
        where = ", ".join(dict.fromkeys(names[node] for node in found.nodes[first : first + group_size]))
        notify(
            "status",
            text=f"{len(found.torn)} of {len(found.nodes) // group_size} tensor-parallel groups are on several nodes, "
            f"the first on {where}, because no node has room for more whole ones: each layer waits for the network",
        )
