# What is looked at before anything is trained. Sourced by launch.sh.

CLOCK_SKEW_S=60
readonly CLOCK_SKEW_S

# USR1 would come at once, at every start: an endless row of runs of one step.
check_time_limit() {
    local limit seconds
    limit=$(squeue -h -j "$SLURM_JOB_ID" -o %l)
    seconds=$(in_seconds "$limit")
    # Slurm looks each half minute, and may signal that much too early.
    ((seconds > DPO_SAVE_LEAD_S + 30)) ||
        refuse "--time is $limit, but saving begins $DPO_SAVE_LEAD_S s before its end" \
            "(DPO_SAVE_LEAD_S); expected more than $((DPO_SAVE_LEAD_S + 30)) s: raise --time, or" \
            "lower DPO_SAVE_LEAD_S and with it --signal=B:USR1@SECONDS"
}

# As squeue writes it.
in_seconds() {
    if [[ $1 =~ ^(([0-9]+)-)?(([0-9]+):)?([0-9]+):([0-9]+)$ ]]; then
        echo $((10#${BASH_REMATCH[2]:-0} * 86400 + 10#${BASH_REMATCH[4]:-0} * 3600 + \
            10#${BASH_REMATCH[5]} * 60 + 10#${BASH_REMATCH[6]}))
    else
        echo 999999999 # UNLIMITED
    fi
}

open_run_folder() {
    local trouble
    trouble=$({ mkdir -p "$LOGS" && touch "$LOGS/.canary" && rm "$LOGS/.canary"; } 2>&1) ||
        refuse "run folder $RUN cannot be written from $(hostname): ${trouble//$'\n'/ };" \
            "expected a folder on a file system that all nodes share; choose another" \
            "logger.log_dir"
    local free # another node would have no more
    free=$(df -Pk "$RUN" | awk 'NR == 2 { print int($4 / 1048576) }') || free=0
    ((free >= DPO_MIN_FREE_GIB)) ||
        refuse "run folder $RUN has $free GiB free, expected $DPO_MIN_FREE_GIB" \
            "(DPO_MIN_FREE_GIB); make room, or choose another logger.log_dir"
}

refuse_if_in_use() {
    if is_in_use; then
        refuse "run folder $RUN is in use by job $other_job; wait until that ends (sbatch" \
            "--dependency=afterany:$other_job), or choose another logger.log_dir"
    fi
}

preflight() {
    if ((DPO_PREFLIGHT_S == 0)); then
        say "preflight: none (DPO_PREFLIGHT_S=0)"
        return
    fi
    phase=preflight
    local folder=$LOGS/$ATTEMPT.preflight
    rm -rf "$folder"
    mkdir "$folder"
    look_at_nodes "$folder"
    if ((NUM_NODES * PROCS > 1)); then
        all_reduce "$folder"
    fi
    phase=start
}

# preflight.sh on every node: each answers in one line, or is as bad as one that does not.
look_at_nodes() {
    local folder=$1 ticker node line checks bad=() reasons=() no_canary=0 rc=0 within=
    say "preflight of ${NODES[*]}"
    # What each node compares its clock with, and sees whether files arrive.
    while date +%s >"$folder/clock.new" && mv "$folder/clock.new" "$folder/clock"; do
        sleep 1
    done &
    ticker=$!
    run_step look_at_preflight timeout --kill-after=10 "$DPO_PREFLIGHT_S" \
        srun "${SRUN[@]}" --kill-on-bad-exit=0 \
        bash slurm/preflight.sh "$folder" "$LOGS/$ATTEMPT" "$GPUS" "$CLOCK_SKEW_S" \
        "$DPO_MIN_FREE_GIB" >"$folder/answers" 2>&1 || rc=$?
    kill "$ticker" 2>/dev/null || true
    cat "$folder/answers"
    leave_if_told
    ((rc != 124 && rc != 137)) || within=" within $DPO_PREFLIGHT_S s"
    if ! grep -q '^preflight ' "$folder/answers"; then # no node is to blame for what none can do
        failed "preflight: no node has answered: srun, the container, or $PWD is not on the nodes"
    fi
    for node in "${NODES[@]}"; do
        line=$(grep "^preflight $node: " "$folder/answers" | head -n 1) || true
        if [[ $line == *": ok" ]]; then
            continue
        fi
        [[ -n $line ]] || say "preflight $node: bad: no answer$within"
        [[ $line != *": bad: shared folder: "* ]] || no_canary=$((no_canary + 1))
        bad+=("$node") reasons+=("${line#*: bad: }")
    done
    if ((NUM_NODES > 1 && no_canary == NUM_NODES - 1 && ${#bad[@]} == no_canary)); then
        refuse "no node but ${NODES[0]} sees the files of run folder $RUN; expected a folder that" \
            "all nodes share; choose another logger.log_dir"
    fi
    ((${#bad[@]})) || return 0
    checks=$(printf '%s\n' "${reasons[@]%%:*}" | sort -u)
    if ((NUM_NODES > 1 && ${#bad[@]} == NUM_NODES)) && [[ $checks != *$'\n'* ]]; then
        # Other nodes would be no better, and at last the job would have none left to wait for.
        failed "preflight: all nodes fail alike: $checks"
    fi
    failed "preflight: bad nodes: ${bad[*]}" "${bad[@]}"
}

# What saves nothing need not be waited for.
look_at_preflight() {
    if ((asked_to_stop || got_term)); then
        kill -TERM "$step_pid" 2>/dev/null || true
    fi
}

# All GPUs of each node, then all of the job, in processes such as the training's.
all_reduce() {
    local folder=$1 node bad=() see="see $LOGS/$ATTEMPT.*.log"
    run_step look_at_preflight timeout --kill-after=10 "$DPO_PREFLIGHT_S" \
        srun "${SRUN[@]}" --kill-on-bad-exit=0 \
        --output="${LOGS//%/%%}/$ATTEMPT.%N.log" --open-mode=append \
        bash slurm/node.sh $((PORT + 1)) "$RUN" slurm/allreduce.py "$folder" || true
    leave_if_told
    for node in "${NODES[@]}"; do
        [[ -e $folder/$node.local ]] || bad+=("$node")
    done
    if ((NUM_NODES > 1 && ${#bad[@]} == NUM_NODES)); then
        failed "preflight: no node has finished an all-reduce of its own; $see"
    elif ((${#bad[@]})); then
        failed "preflight: no all-reduce among the processes of ${bad[*]}; $see" "${bad[@]}"
    fi
    for node in "${NODES[@]}"; do
        [[ -e $folder/$node.all ]] ||
            failed "preflight: an all-reduce in each node works, over all nodes it does not; $see"
    done
    say "preflight: all-reduce: $(cat "$folder/rate" 2>/dev/null)"
}
