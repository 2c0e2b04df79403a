"""Ray Train's process group: refused where torch cannot use a GPU, joined where a host's name leads nowhere else."""

from __future__ import annotations

import os
import socket
from typing import Any

import ray
from ray.train.torch import TorchConfig

from plop_dist.errors import ConfigError
from plop_dist.values.interface import interface_with, is_loopback, name_is_loopback


class GroupConfig(TorchConfig):
    """Ray Train's own configuration, whose group is joined through the interface that the node has for Ray."""

    @property
    def backend_cls(self) -> Any:
        """Return the class that Ray Train makes to set up the workers."""
        return _Group


class _Group(TorchConfig().backend_cls):  # type: ignore[misc]  # the class is known by this property alone
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if "nccl" in backend_config.backend:
            worker_group.execute(_check_gpu)
        worker_group.execute(_name_interface)
        super().on_start(worker_group, backend_config)


def _check_gpu() -> None:
    """Raise ConfigError where torch cannot use the GPU that Ray has given this worker."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            f"cluster.gpus_per_worker: Ray gives each worker a GPU, but torch {torch.__version__} on "
            f"{socket.gethostname()} can use none; install torch for CUDA and its driver there, or set "
            "cluster.gpus_per_worker=0."
        )


def _name_interface() -> None:
    """Have gloo take the interface of the node's address in the cluster, unless the user has named one."""
    address = ray.util.get_node_ip_address()
    if "GLOO_SOCKET_IFNAME" not in os.environ and name_is_loopback() and not is_loopback(address):
        interface = interface_with(address)
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
