# What an attempt's files say, and what follows: done, stop, or requeue. Sourced by launch.sh.

last_attempt=0     # before this start
first_checkpoint=0 # the newest one before this start; 0 = none
other_job=         # which the run is in use by

newest_attempt() {
    local folder number newest=0
    for folder in "$RUN"/attempts/*/; do
        number=$(basename "$folder")
        if [[ $number =~ ^[0-9]+$ ]] && ((10#$number > newest)); then
            newest=$((10#$number))
        fi
    done
    echo "$newest"
}

# JOB.RESTART, or nothing where it was not begun by Slurm.
job_of_attempt() {
    sed -n 's/.*"slurm_job": *"\([0-9.]*\)".*/\1/p' \
        "$RUN/attempts/$(printf %04d "$1")/attempt.json" 2>/dev/null || true
}

# Whether the run is another job's at present -> other_job.
is_in_use() {
    local newest folder
    newest=$(newest_attempt)
    folder=$RUN/attempts/$(printf %04d "$newest")
    other_job=$(job_of_attempt "$newest")
    other_job=${other_job%.*}
    [[ -n $other_job && $other_job != "$SLURM_JOB_ID" && ! -e $folder/exit.json &&
        $(squeue -h -j "$other_job" -o %T 2>/dev/null) == RUNNING ]]
}

# Its step; 0 = there is none.
newest_checkpoint() {
    local parent='' word folder step newest=0
    if [[ -f $RUN/config.yaml ]]; then
        parent=$(sed -n 's/^  checkpoint_dir: *//p' "$RUN/config.yaml")
    fi
    for word in "${ARGUMENTS[@]}"; do
        if [[ $word == checkpointing.checkpoint_dir=* ]]; then
            parent=${word#*=}
        fi
    done
    if [[ -z $parent || $parent == null ]]; then
        parent=$RUN/checkpoints
    fi
    for folder in "$parent"/step_*/; do
        step=$(basename "$folder")
        step=${step#step_}
        if [[ $step =~ ^[0-9]+$ ]] && ((step > newest)); then
            newest=$step
        fi
    done
    echo "$newest"
}

# exit.json -> code, cause, message of this start's attempt; code= where it has left none. An error
# before the run folder was the run's is only in a log.
read_exit() {
    local attempt file line
    code='' cause='' message=''
    attempt=$(newest_attempt)
    while [[ $(job_of_attempt "$attempt") != @("$ATTEMPT"|'') ]]; do # another job's meanwhile
        attempt=$((attempt - 1))
    done
    file=$RUN/attempts/$(printf %04d "$attempt")/exit.json
    if ((attempt > last_attempt)) && [[ -f $file ]]; then
        code=$(sed -n 's/^ *"code": *\([0-9]*\),*$/\1/p' "$file")
        cause=$(sed -n 's/^ *"cause": *"\(.*\)",*$/\1/p' "$file")
        message=$(sed -n 's/^ *"message": *"\(.*\)",*$/\1/p' "$file")
        return
    fi
    for file in "$LOGS/$ATTEMPT."*.log; do
        line=$(grep -a '^error\[[0-9]*\]: ' "$file" | tail -n 1) || true
        if [[ $line =~ ^error\[([0-9]+)\]:\ (.*)$ ]]; then
            code=${BASH_REMATCH[1]} cause=error message=${BASH_REMATCH[2]}
        fi
    done
}

conclude() {
    local code cause message newest how='left no exit.json'
    read_exit
    newest=$(newest_checkpoint)
    if [[ -n $code ]]; then
        how="ended with $code: $message"
    fi
    say "the attempt has $how; checkpoint $newest"
    case $code in
    0)
        fingerprint >"$LOGS/done"
        say "done: $RUN"
        exit 0
        ;;
    65 | 78 | 93)
        say "stopped for good: starting again does not help"
        exit "$code"
        ;;
    esac
    if [[ $code == 75 && $cause == stop ]]; then
        if ((!asked_to_stop)) && [[ $message == *"by the stop file"* ]]; then
            say "stopped by hand: $RUN/stop; the same sbatch command goes on"
            exit 75
        fi
        # One that a preemption ends before the first checkpoint is nobody's failure.
        if ((!asked_to_stop || newest > first_checkpoint)); then
            requeue "go on from checkpoint $newest"
        fi
    fi
    if [[ $code == 75 && $message == *" is in use by "* ]] && is_in_use; then
        say "not requeued: $RUN is in use by job $other_job, which goes on"
        exit 75
    fi
    failed "${hang_reason:-the attempt has $how}"
}

# Told to stop before the training has begun: nothing to judge.
conclude_unstarted() {
    if ((got_term)); then
        say "ended before the training"
        exit 1
    fi
    if ((!asked_to_stop)); then
        requeue "preempted before the training"
    fi
    # USR1 that a person has sent comes once; the time limit's would come at each start.
    if (($(in_seconds "$(squeue -h -j "$SLURM_JOB_ID" -o %L)") > DPO_SAVE_LEAD_S + 60)); then
        requeue "USR1 before the training"
    fi
    failed "USR1 before the training had begun: --time is too short for the preflight"
}

# Slurm signals the steps alone then, and requeues the job when its grace is over.
is_preempted() {
    [[ $(about_job PreemptTime) != @(None|'') ]]
}

about_job() {
    scontrol -o show job "$SLURM_JOB_ID" | sed -n "s/.* $1=\([^ ]*\).*/\1/p" || true
}

# Counts failures of this job at the same checkpoint. $1: why; the rest: nodes to leave out.
failed() {
    local newest count=0 at=-1
    newest=$(newest_checkpoint)
    if [[ -f $LOGS/$SLURM_JOB_ID.failures ]]; then
        read -r at count <"$LOGS/$SLURM_JOB_ID.failures" || true
    fi
    if ((at != newest)); then
        count=0
    fi
    count=$((count + 1))
    echo "$newest $count" >"$LOGS/$SLURM_JOB_ID.failures"
    say "failure $count of at most $DPO_MAX_FAILURES at checkpoint $newest: $1"
    if ((count >= DPO_MAX_FAILURES)); then
        say "stopped for good: no progress since checkpoint $newest; see $LOGS/$ATTEMPT.*.log"
        exit 1
    fi
    local asked bad
    asked=$(about_job ReqNodeList)
    if (($# > 1)) && [[ $asked != @("(null)"|'') ]]; then
        asked=" $(scontrol show hostnames "$asked" | tr '\n' ' ') "
        for bad in "${@:2}"; do
            if [[ $asked == *" $bad "* ]]; then # left out and asked for: pending for ever
                say "stopped for good: $bad is bad, and asked for by --nodelist"
                exit 1
            fi
        done
    fi
    requeue "$@"
}

# $1: why; the rest: nodes to leave out.
requeue() {
    local state reason=$1
    shift
    # scontrol requeue would bring a cancelled job back to life.
    state=$(squeue -h -j "$SLURM_JOB_ID" -o %T) || true
    if ((got_term)) || [[ $state != RUNNING ]]; then
        say "not requeued by this script: ${state:-gone}, SIGTERM seen: $got_term"
        exit 1
    fi
    say "requeue: $reason"
    trap '' TERM # Slurm ends this shell now, and scontrol with it, who still have to say which nodes
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        say "not requeued: submit it again"
        exit 1
    fi
    if (($#)); then
        exclude "$@"
    fi
    exit 0
}

# Slurm takes new nodes to leave out only once the job is pending again; until then this shell has
# KillWait (30 s).
exclude() {
    local before all try
    before=$(about_job ExcNodeList)
    all=$(IFS=,; echo "$*")
    if [[ -n $before && $before != "(null)" ]]; then
        all=$before,$all
    fi
    for try in {1..60}; do
        if scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$all" 2>/dev/null; then
            say "left out from now on: $all (scontrol update JobId=$SLURM_JOB_ID ExcNodeList=...)"
            return
        fi
        pause 0.3
    done
    say "ExcNodeList=$all was not taken in $try tries"
}

# The same command and config: a later job of a chain need not start anything. With other overrides
# the trainer itself says whether a finished run is to be extended.
fingerprint() {
    local word last='' configs=("$DPO_CONFIG")
    for word in "${ARGUMENTS[@]}"; do
        if [[ $word == --c*=* ]]; then # --conf is short for --config
            configs+=("${word#*=}")
        elif [[ $last == --c* && $last != *=* ]]; then
            configs+=("$word")
        fi
        last=$word
    done
    for word in "${configs[@]}"; do
        cat -- "$word" 2>&1 || true
        printf '\0'
    done | { cat; printf '%s\0' "${ARGUMENTS[@]}"; } | sha256sum
}

is_done() {
    [[ -f $RUN/finished.json && -f $LOGS/done && $(<"$LOGS/done") == "$(fingerprint)" ]]
}
