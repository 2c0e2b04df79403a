#!/bin/sh
# Starts the ranks with torchrun, without Ray; torchrun reads its own options from PET_ variables.
#
#   PET_NPROC_PER_NODE=8 launchers/torchrun.sh CONFIG [key=value ...]
#
# On several nodes run it on each, with PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT set as well.
# nproc_per_node * nnodes must be tp * pp * dp * cp.
set -eu
exec torchrun --module plop_dist.cli run "$@"
