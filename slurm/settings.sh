# Variables of a job: what was given, checked, and what follows from it. Sourced by launch.sh.

# Phases in which the heartbeat is rewritten at least each half minute plus one step or micro-batch
# (lifecycle/position.py: LIMITED); elsewhere files are read and written, which may take long.
STEP_PHASES='step|compute|optimizer|sweep|validation'
readonly STEP_PHASES

settings() {
    : "${DPO_SAVE_LEAD_S:=600}" "${DPO_MAX_FAILURES:=3}" "${DPO_HANG_S:=1800}"
    : "${DPO_START_HANG_S:=14400}" "${DPO_PREFLIGHT_S:=300}" "${DPO_MIN_FREE_GIB:=10}"
    export DPO_TORCHRUN=${DPO_TORCHRUN:-torchrun}
    local name
    for name in DPO_SAVE_LEAD_S DPO_MAX_FAILURES DPO_HANG_S DPO_START_HANG_S DPO_PREFLIGHT_S \
        DPO_MIN_FREE_GIB; do
        # Bash takes 010 for 8, 09 for an error, and 20 digits for some other number.
        [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] ||
            refuse "$name=${!name}; expected a whole number of at most 9 digits, without 0 before it"
    done
    ((DPO_SAVE_LEAD_S >= 20)) || refuse "DPO_SAVE_LEAD_S=$DPO_SAVE_LEAD_S; expected at least 20"
    [[ -f $DPO_CONFIG ]] || refuse "no config $PWD/$DPO_CONFIG; set DPO_CONFIG to a YAML file"
    if [[ -z ${DPO_CONTAINER_IMAGE:-} && -d .venv/bin ]]; then
        export PATH=$PWD/.venv/bin:$PATH
    fi
    name_run_folder
    name_nodes
    name_processes
    ATTEMPT=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    # Below Linux's ephemeral ports (32768), another one for each job and restart; the one after it
    # is the preflight's.
    PORT=$((20000 + 2 * ((SLURM_JOB_ID * 13 + ${SLURM_RESTART_COUNT:-0}) % 5000)))
    export MASTER_ADDR=${NODES[0]}
    SRUN=(--nodes="$NUM_NODES" --ntasks="$NUM_NODES" --ntasks-per-node=1
        # One task a node: bound to one core, all its ranks would share it.
        --cpu-bind=none)
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
        SRUN+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # srun does not take it over since 22.05
    fi
    container_options
    environment
}

is_dry_run() {
    [[ ! ${DPO_DRY_RUN:-0} =~ ^(0|[Nn]o|[Ff]alse|[Oo]ff|NO|FALSE|OFF)$ ]]
}

refuse() {
    echo "error: $*" >&2
    exit 2
}

# RUN and LOGS: a requeued job must find its run again, on any node.
name_run_folder() {
    local given=${DPO_RUN_DIR:-} word
    for word in "${ARGUMENTS[@]}"; do
        if [[ $word == logger.log_dir=* ]]; then
            given=${word#*=}
        fi
    done
    if [[ $given =~ ^\"(.*)\"$ || $given =~ ^\'(.*)\'$ ]]; then
        given=${BASH_REMATCH[1]} # the trainer takes such quotes off, too
    fi
    [[ -n $given && ! $given =~ ^(~|null|Null|NULL)$ ]] || refuse "no run folder: a requeued job would not find its run; give" \
        "logger.log_dir=/shared/runs/NAME after the script, or set DPO_RUN_DIR"
    if [[ $given != /* ]]; then
        given=$PWD/$given
    fi
    RUN=$given
    LOGS=$RUN/slurm
}

# NODES in Slurm's order, which follows the topology and which tensor and pipeline placement rely on.
name_nodes() {
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        is_dry_run ||
            refuse "not in a Slurm job; expected: sbatch $0 key=value ...; DPO_DRY_RUN=1 bash" \
                "$0 ... only prints the srun line"
        SLURM_JOB_ID=0 NODES=("<first node>")
        NUM_NODES=$(directive nodes)
        : "${SLURM_GPUS_ON_NODE:=$(directive gpus-per-node)}"
        return
    fi
    local text
    text=$(scontrol show hostnames "$SLURM_JOB_NODELIST") ||
        refuse "scontrol show hostnames $SLURM_JOB_NODELIST failed; the nodes are unknown"
    mapfile -t NODES <<<"$text"
    NUM_NODES=$SLURM_NNODES
    ((${#NODES[@]} == NUM_NODES)) ||
        refuse "SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST names ${#NODES[@]} nodes; expected" \
            "SLURM_NNODES=$NUM_NODES"
}

directive() {
    sed -n "s/^#SBATCH --$1=//p" "$0"
}

# PROCS: processes a node, one for each GPU.
name_processes() {
    local gpus=${SLURM_GPUS_ON_NODE:-0}
    GPUS=$gpus PROCS=${DPO_PROCS_PER_NODE:-$gpus}
    export DPO_PROCS=$PROCS
    [[ -z ${DPO_PROCS_PER_NODE:-} || $PROCS =~ ^[1-9][0-9]{0,3}$ ]] ||
        refuse "DPO_PROCS_PER_NODE=$PROCS; expected a whole number from 1 to 9999"
    [[ $PROCS =~ ^[1-9][0-9]*$ ]] ||
        refuse "no GPUs in this job; expected sbatch --gpus-per-node=N, or DPO_PROCS_PER_NODE=N" \
            "for N processes a node on CPUs"
    if ((gpus && PROCS > gpus)); then
        refuse "DPO_PROCS_PER_NODE=$PROCS, but the job has $gpus GPUs a node; each process needs" \
            "one: lower it, or ask for more with --gpus-per-node"
    fi
}

# NVIDIA's pyxis: the repository and the run folder are mounted where they are.
container_options() {
    local image=${DPO_CONTAINER_IMAGE:-} mount mounts=()
    if [[ -z $image ]]; then
        [[ -z ${DPO_CONTAINER_MOUNTS:-} ]] ||
            refuse "DPO_CONTAINER_MOUNTS is set without DPO_CONTAINER_IMAGE; set both or neither"
        return
    fi
    if [[ $image == *.sqsh || $image == /* || $image == ./* ]] && [[ ! -e $image ]]; then
        refuse "DPO_CONTAINER_IMAGE=$image is not there on $(hostname); expected a file that all" \
            "nodes see, or an image such as nvcr.io#nvidia/pytorch:26.01-py3"
    fi
    IFS=, read -ra mounts <<<"${DPO_CONTAINER_MOUNTS:-}"
    for mount in "${mounts[@]}"; do
        [[ -e ${mount%%:*} ]] ||
            refuse "DPO_CONTAINER_MOUNTS=$mount: ${mount%%:*} is not there on $(hostname);" \
                "expected SOURCE:TARGET[:FLAGS],... of files or folders that all nodes have"
    done
    SRUN+=(--container-image="$image" --container-workdir="$PWD"
        # What lies in one's home (~/.local, ~/.bashrc) would get before the image's own packages.
        --no-container-mount-home
        --container-mounts="$PWD:$PWD,$RUN:$RUN${DPO_CONTAINER_MOUNTS:+,$DPO_CONTAINER_MOUNTS}")
}

# What NCCL and CUDA need to know, where the site or the user has not said it. The trainer sets
# CUDA_DEVICE_MAX_CONNECTIONS=1 itself (Megatron's order of kernels).
environment() {
    # sbatch --export=NONE would pass to srun, and leave the steps without PATH and all of this.
    export SLURM_EXPORT_ENV=ALL
    # An NCCL error without it is "unhandled system error" and nothing else.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # NVLink SHARP takes GPU memory for each communicator, of which TP, PP and DP make many, and does
    # not start where the fabric manager is not right. 1 to try it.
    export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
    # Micro-batches differ in length: without it the allocator's segments of each size stay behind.
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}
    # The last collectives of each rank, written when one times out: who was where.
    export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
    export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
    export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$LOGS/$ATTEMPT.collectives_rank_}
    # Rank output reaches the log when it is written, not when a buffer is full or never.
    export PYTHONUNBUFFERED=1
    # A crash must not write the host memory of every rank to the shared folder.
    ulimit -c 0
}
