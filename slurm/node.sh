#!/usr/bin/env bash
# What srun starts on each node: torchrun with this node's number.
#   node.sh PORT RUN_FOLDER SCRIPT ARGUMENT...
set -uo pipefail
shopt -s nullglob
port=$1 run=$2 script=$3
shift 3

# Slurm and srun signal every process of a step, and whoever has no handler dies of it: torchrun
# and its helpers would before the ranks have saved. An ignored signal stays ignored in children,
# until a rank installs its handler.
trap '' USR1 USR2 TERM

# Static rendezvous: c10d numbers nodes by name or address, not as Slurm does. Without TERM among
# the signals that it handles, torchrun sits one out and ends when its ranks have.
"$DPO_TORCHRUN" \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$DPO_PROCS" --node-rank="$SLURM_NODEID" \
    --rdzv-backend=static --master-addr="$MASTER_ADDR" --master-port="$port" \
    --max-restarts=0 --signals-to-handle=SIGINT,SIGHUP,SIGQUIT \
    "$script" "$@"
rc=$?

# srun kills the other nodes as soon as this one has failed: let their ranks write why.
has_exit() {
    local folder
    is_begun=0
    for folder in "$run"/attempts/[0-9]*/; do
        if ((10#$(basename "$folder") > ${DPO_LAST_ATTEMPT:-0})); then
            is_begun=1
            [[ ! -e $folder/exit.json ]] || return 0
        fi
    done
    return 1
}

if [[ $rc != 0 && $script == *train.py ]]; then
    for _ in {1..50}; do
        if has_exit || ((!is_begun)); then
            break
        fi
        sleep 0.2
    done
    sleep 1
fi
exit "$rc"
