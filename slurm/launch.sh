# What the job scripts have in common. Sourced by them in the batch shell on the job's first node,
# from the repository root. slurm/README.md says what it does and what each DPO_* means.
#
#   settings -> preflight of every node -> train, watched -> what its files say: done or requeue
#
# The trainer's files decide, not return codes: torchrun returns 1 for every code, srun the highest
# of all nodes.
set -euo pipefail
umask 077 # as the trainer: logs and configurations may name what is private
shopt -s nullglob
ARGUMENTS=("$@") # the trainer's
source slurm/settings.sh
source slurm/checks.sh
source slurm/outcome.sh

phase=start      # start, preflight, train
step_pid=0       # of the srun at work
got_term=0       # scancel, or the end of a preemption's grace: requeueing is Slurm's business
asked_to_stop=0  # USR1: the time limit is near
save_s=0         # how long saving may take then
stop_by=0        # SECONDS at which the step must have ended, once asked_to_stop
hang_reason=     # why the watchdog ended the step

main() {
    settings
    if is_dry_run; then
        dry_run
        return
    fi
    check_time_limit
    if is_done; then
        say "done already: $RUN/finished.json, by this very command and config"
        return
    fi
    open_run_folder
    refuse_if_in_use
    trap on_usr1 USR1
    trap on_term TERM
    preflight
    train
    conclude
}

dry_run() {
    local step
    train_step step
    printf '%q ' "${step[@]}"
    echo
}

# The srun line of the training -> the array named by $1. What the user gave comes last: a later
# key=value wins.
train_step() {
    local -n _line=$1
    _line=(
        srun "${SRUN[@]}"
        # Nothing to wait for once a node has failed; node.sh gives the ranks time to say why. A
        # node that ends well leaves rank 0 ten minutes to close its loggers.
        --kill-on-bad-exit=1 --wait=600
        # % begins a pattern: %N is the node.
        --output="${LOGS//%/%%}/$ATTEMPT.%N.log" --open-mode=append
        bash slurm/node.sh "$PORT" "$RUN" reinforcer_tp/train.py --config "$DPO_CONFIG"
        cluster.num_nodes="$NUM_NODES" cluster.gpus_per_node="$PROCS"
    )
    if [[ -n ${DPO_RUN_DIR:-} ]]; then
        _line+=(logger.log_dir="$DPO_RUN_DIR")
    fi
    _line+=("${ARGUMENTS[@]}")
}

# Runs a step in the background, since bash answers a signal between two commands only, and looks
# each second until it has ended. $1: what to call for a look; the rest: the command.
run_step() {
    local look=$1
    shift
    "$@" &
    step_pid=$!
    while kill -0 "$step_pid" 2>/dev/null; do
        sleep 1 &
        wait -n "$step_pid" $! || true
        if kill -0 "$step_pid" 2>/dev/null; then
            "$look"
        fi
    done
    local rc=0
    wait "$step_pid" 2>/dev/null || rc=$?
    step_pid=0
    return "$rc"
}

train() {
    local step rc=0
    train_step step
    last_attempt=$(newest_attempt)
    export DPO_LAST_ATTEMPT=$last_attempt
    first_checkpoint=$(newest_checkpoint)
    # Of an earlier attempt: a stop asked of that one would end this one after a step.
    refuse_if_in_use
    rm -f "$RUN/stop" "$RUN/heartbeat"
    leave_if_told
    say "training: $NUM_NODES x $PROCS processes from ${NODES[0]}:$PORT, checkpoint" \
        "$first_checkpoint, logs $LOGS/$ATTEMPT.*.log"
    phase=train last_beat='' moved_at=$SECONDS
    run_step look_at_training "${step[@]}" || rc=$?
    phase=start
    say "srun has ended with $rc"
}

# The batch shell gets USR1 before the time limit (--signal=B:USR1@600).
on_usr1() {
    if ((asked_to_stop)); then
        return
    fi
    asked_to_stop=1
    # At the limit itself Slurm ends the job for good: keep some of the lead for the requeue.
    save_s=$((DPO_SAVE_LEAD_S - DPO_SAVE_LEAD_S / 10 - 10))
    stop_by=$((SECONDS + save_s))
    say "USR1: the time limit is near; save and requeue"
    if [[ $phase == train ]]; then
        touch "$RUN/stop" # also for a rank that has no handler yet
        if ((step_pid)); then
            kill -USR1 "$step_pid" || true # srun forwards it to all tasks
        fi
    fi
}

on_term() {
    got_term=1
    say "SIGTERM: cancelled, or preempted and out of grace"
}

leave_if_told() {
    if ((got_term || asked_to_stop)) || is_preempted; then
        conclude_unstarted
    fi
}

# The outer watchdog: the ranks watch each other (cluster.hang_timeout_s) and name the culprit;
# this one acts where even that does not.
look_at_training() {
    local beat='' limit=$DPO_START_HANG_S
    if ((stop_by && SECONDS >= stop_by)); then
        end_step "not ended $save_s s after USR1"
        return
    fi
    # Its content, not its time: clocks of a file server differ.
    { read -r beat <"$RUN/heartbeat"; } 2>/dev/null || true
    if [[ $beat != "$last_beat" ]]; then
        last_beat=$beat moved_at=$SECONDS
        return
    fi
    if [[ $beat =~ \"phase\":\ \"($STEP_PHASES)\" ]]; then
        limit=$DPO_HANG_S
    fi
    if ((limit && SECONDS - moved_at >= limit)); then
        end_step "no heartbeat for $limit s; last: ${beat:-none}"
    fi
}

end_step() {
    hang_reason=$1
    say "$1: stacks to $RUN/attempts and the node logs, then the end"
    kill -USR2 "$step_pid" 2>/dev/null || true
    pause 5
    kill -TERM "$step_pid" 2>/dev/null || true # srun then kills the tasks at once
    local deadline=$((SECONDS + 60))
    while kill -0 "$step_pid" 2>/dev/null && ((SECONDS < deadline)); do
        pause 1
    done
    kill -KILL "$step_pid" 2>/dev/null || true
}

# A sleep that a trapped signal may cut short.
pause() {
    sleep "$1" &
    wait $! || true
}

say() {
    echo "[$(date '+%F %T')] job ${SLURM_JOB_ID:-none}.${SLURM_RESTART_COUNT:-0}: $*"
}

main
