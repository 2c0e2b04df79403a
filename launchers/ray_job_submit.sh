#!/bin/sh
# Runs a configuration as a job on a Ray cluster, with Ray's own client.
#
#   RAY_API_SERVER_ADDRESS=http://HEAD:8265 launchers/ray_job_submit.sh /shared/config.yaml [key=value ...]
#
# CONFIG and the paths in it are those of the cluster's nodes; run_dir must be on storage that all nodes share. The
# head node must have been started with plop-dist's virtual environment on its PATH. `plop-dist submit` does the same
# and also carries a local CONFIG to the cluster.
set -eu
exec ray job submit -- python -m plop_dist.cli run "$@" cluster.address=auto
