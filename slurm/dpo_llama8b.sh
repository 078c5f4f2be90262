#!/bin/bash
# DPO of Llama-3.1-8B: one node of 8 GPUs, tp=2, dp=4.
#   sbatch slurm/dpo_llama8b.sh logger.log_dir=/shared/runs/dpo_8b dpo.seed=1
#   DPO_DRY_RUN=1 bash slurm/dpo_llama8b.sh logger.log_dir=/shared/runs/dpo_8b
# Options of sbatch before the script win over the lines below (--partition, --account, --nodes=2,
# --time=...); what follows the script goes to the trainer. DPO_* variables: slurm/README.md.
#SBATCH --job-name=dpo_llama8b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

DPO_CONFIG=${DPO_CONFIG:-configs/dpo_llama8b.yaml}
# Slurm runs a copy of this file from its spool folder: $0 does not lead to the repository.
if [[ -n ${DPO_REPO:-} || ! -f slurm/launch.sh ]] &&
    ! cd "${DPO_REPO:-${SLURM_SUBMIT_DIR:-$PWD}}" || [[ ! -f slurm/launch.sh ]]; then
    echo "error: no slurm/launch.sh in $PWD; submit from the repository root, or set DPO_REPO" >&2
    exit 2
fi
source slurm/launch.sh
