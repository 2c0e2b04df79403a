"""On how many nodes an engine is to train, with how many GPUs each: by a key, else as the ranks lie that scored."""

from __future__ import annotations

import os

from plop_dist import ranks
from plop_dist.config.schema import Config
from plop_dist.errors import LayoutError


def nodes_of(config: Config) -> tuple[int, int]:
    """Return the number of nodes and of GPUs on each, whose product is the number of ranks.

    cluster.gpus_per_node says how many GPUs a node has; else the ranks' launcher (LOCAL_WORLD_SIZE, which Ray's workers
    have too); else one node has them all. Raises LayoutError for ranks that do not fill whole nodes.
    """
    num_ranks, given = config.parallel.world_size, config.cluster.gpus_per_node
    per_node, said_by = given, "cluster.gpus_per_node"
    if per_node is None:
        per_node = ranks.launcher_number(os.environ, "LOCAL_WORLD_SIZE", num_ranks)
        said_by = "the number of ranks on this node (LOCAL_WORLD_SIZE)"
    if num_ranks % per_node and num_ranks > per_node:
        raise LayoutError(
            f"{config.parallel.layout.product_text} = {num_ranks} GPUs, which nodes of {per_node} ({said_by}) do not "
            "make up; set cluster.gpus_per_node to a divisor, or change the parallel section."
        )
    return max(1, num_ranks // per_node), min(per_node, num_ranks)
