#!/bin/bash
# DPO of a 70B Llama: one torchrun on each node. Submit from the repository root; what follows the
# script goes to the trainer:
#   sbatch slurm/dpo_llama70b.sh dpo.seed=1 logger.log_dir=/shared/runs/dpo_70b
#   sbatch --nodes=4 --partition=... --account=... slurm/dpo_llama70b.sh
# and a later --config names another model's file:
#   sbatch --nodes=128 slurm/dpo_llama70b.sh --config configs/dpo_llama405b.yaml
# The repository, its .venv and the log folder must be visible on every node.
#SBATCH --job-name=dpo_llama70b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out

set -euo pipefail

# Slurm runs a copy of this script from its spool folder, so $0 does not lead to the repository.
cd "${SLURM_SUBMIT_DIR:?this script is for sbatch: sbatch slurm/dpo_llama70b.sh key=value ...}"
if [[ ! -f reinforcer_tp/train.py ]]; then
    echo "no reinforcer_tp/train.py in $PWD; submit from the repository root" >&2
    exit 2
fi
if [[ -d .venv/bin ]]; then
    export PATH="$PWD/.venv/bin:$PATH"
fi

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${nodes%%$'\n'*}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-8}
echo "job $SLURM_JOB_ID: $SLURM_NNODES x $GPUS_PER_NODE GPUs, master $MASTER_ADDR:$MASTER_PORT"

# The single quotes matter: each node expands its own SLURM_NODEID. Static rendezvous keeps Slurm's
# order of nodes, which tensor and pipeline placement rely on. A later key=value wins over an earlier.
srun --kill-on-bad-exit=1 --cpu-bind=none bash -c '
    exec torchrun \
        --nnodes="$SLURM_NNODES" \
        --nproc-per-node="$GPUS_PER_NODE" \
        --node-rank="$SLURM_NODEID" \
        --rdzv-backend=static \
        --master-addr="$MASTER_ADDR" \
        --master-port="$MASTER_PORT" \
        reinforcer_tp/train.py --config configs/dpo_llama70b.yaml \
        cluster.num_nodes="$SLURM_NNODES" cluster.gpus_per_node="$GPUS_PER_NODE" "$@"
' torchrun_on_node "$@"
