#!/bin/sh
# Starts one rank per slot of a DeepSpeed hostfile (lines `HOST slots=N`), without Ray.
#
#   launchers/deepspeed_hostfile.sh HOSTFILE CONFIG [key=value ...]
#
# The slots must be as many as tp * pp * dp * cp. The first host must answer ssh without a password; DEEPSPEED_OPTIONS
# holds further options of the launcher, on one machine without ssh
# DEEPSPEED_OPTIONS="--no_ssh --node_rank 0 --master_addr 127.0.0.1".
set -eu
hostfile=$1
shift
# shellcheck disable=SC2086 # several options in one variable
exec deepspeed --hostfile "$hostfile" ${DEEPSPEED_OPTIONS:-} --no_local_rank --module plop_dist.cli run "$@"
