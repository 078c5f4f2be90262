#!/usr/bin/env bash
# Whether this node can train: one line to stdout, "preflight NODE: ok" or
# "preflight NODE: bad: CHECK: what, expected". In the training's container, if there is one.
#   preflight.sh FOLDER LOG GPUS CLOCK_SKEW_S MIN_FREE_GIB
set -uo pipefail
# Slurm signals each process of a step: a preempted job's nodes are not bad.
trap '' USR1 USR2 TERM
folder=$1 log=$2 gpus=$3 skew_s=$4 min_free_gib=$5
node=${SLURMD_NODENAME:-$(hostname)}

say() {
    echo "preflight $node: $*"
    echo "preflight $node: $*" >>"$log.$node.log" || true
} 2>/dev/null

bad() {
    say "bad: $*"
    exit 1
}

# What the batch shell writes each second arrives here, and this node can write.
check_folder() {
    local try
    for try in {1..30}; do
        if [[ -s $folder/clock ]] && echo "$node" 2>/dev/null >"$folder/$node.canary"; then
            return
        fi
        sleep 1
    done
    if [[ ! -e $folder/clock ]]; then
        bad "shared folder: $folder/clock, just written, is not seen after $try s"
    fi
    bad "shared folder: $folder cannot be written"
}

check_clock() {
    local theirs ours skew
    theirs=$(<"$folder/clock") ours=$(date +%s)
    skew=$((ours - theirs))
    ((-skew_s <= skew && skew <= skew_s)) ||
        bad "clock: $skew s from the first node's, expected at most $skew_s; or files come so late"
}

check_disk() { # folder, GiB
    local free
    free=$(df -Pk "$1" 2>/dev/null | awk 'NR == 2 { print int($4 / 1048576) }')
    ((${free:-0} >= $2)) || bad "disk: $1 has ${free:-?} GiB free, expected $2"
}

check_gpus() {
    local found errors
    command -v nvidia-smi >/dev/null || bad "GPUs: no nvidia-smi, expected $gpus GPUs"
    found=$(timeout --signal=KILL 60 nvidia-smi -L 2>&1 | grep -c '^GPU ')
    ((found == gpus)) || bad "GPUs: nvidia-smi lists $found, expected $gpus"
    errors=$(timeout --signal=KILL 60 nvidia-smi --format=csv,noheader,nounits \
        --query-gpu=index,ecc.errors.uncorrected.volatile.total 2>&1 |
        awk -F', *' '$2 + 0 > 0 { printf " GPU %s: %s;", $1, $2 }') # "[N/A]" counts as 0
    [[ -z $errors ]] || bad "ECC: uncorrected errors:$errors expected 0"
}

check_folder
check_clock
check_disk "$folder" "$min_free_gib"
check_disk "${TMPDIR:-/tmp}" 1
((gpus == 0)) || check_gpus
say ok
