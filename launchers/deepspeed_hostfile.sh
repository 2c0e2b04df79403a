#!/bin/sh
# Starts one rank per slot of a DeepSpeed hostfile (lines `HOST slots=N`), without Ray.
#
#   launchers/deepspeed_hostfile.sh HOSTFILE CONFIG [key=value ...]
#
# The slots must be as many as tp * pp * dp * cp. The first host must answer ssh without a password; DEEPSPEED_OPTIONS
# holds further options of the launcher, on one machine without ssh
# DEEPSPEED_OPTIONS="--no_ssh --node_rank 0 --master_addr 127.0.0.1".
#
# ssh gives the ranks of other hosts the environment of a login there. PATH, caches, and what networks, hubs and loggers
# need are sent with them, unless DS_ENV_FILE names a file of yours; tokens and passwords are not: command lines are for
# all to read. Those hosts need their own (HF_HOME with `hf auth login`, ~/.netrc).
set -eu
hostfile=$1
shift
if [ -z "${DS_ENV_FILE:-}" ]; then
    variables=$(mktemp)
    for file in ~/.deepspeed_env .deepspeed_env; do
        if [ -f "$file" ]; then cat "$file"; fi
    done > "$variables"
    python -c 'from plop_dist.launch.environment import lines_for_ssh; print(lines_for_ssh(), end="")' >> "$variables"
    exec 3< "$variables"
    rm "$variables" # what is open can still be read, and nothing is left behind
    export DS_ENV_FILE=/dev/fd/3
fi
# shellcheck disable=SC2086 # several options in one variable
exec deepspeed --hostfile "$hostfile" ${DEEPSPEED_OPTIONS:-} --no_local_rank --module plop_dist.cli run "$@"
