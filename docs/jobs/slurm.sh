#!/usr/bin/env bash
# Train on two machines of a Slurm cluster: `sbatch slurm.sh [override ...]`; README.md has more.
#
# Slurm stops the job some time before its time is up. The job then writes its state, queues itself
# again, and goes on where it was. It does so too when a machine is lost.
#
#SBATCH --job-name=syncbn
#SBATCH --nodes=2
# One torchrun a machine; it starts the ranks.
#SBATCH --ntasks-per-node=1
# Change these three to your machines' GPUs, cores and queue; without GPUs, leave the first out.
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
# To all processes but this script. A run must need less, by launch.stop_timeout_s, for one step.
#SBATCH --signal=TERM@120
#SBATCH --requeue
# A job that is queued again goes on with its output, too.
#SBATCH --open-mode=append
#SBATCH --output=syncbn-%j.log
set -euo pipefail

# Change these: how many ranks a machine has (as many as GPUs), where Python is, and a directory
# that all machines reach. A job that is queued again keeps its number, and so its directory.
ranks_per_machine=1
PATH="$SLURM_SUBMIT_DIR/.venv/bin:$PATH"
run_dir="$SLURM_SUBMIT_DIR/runs/slurm-$SLURM_JOB_ID"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
torchrun=(
    torchrun
    "--nnodes=$SLURM_JOB_NUM_NODES"
    "--nproc-per-node=$ranks_per_machine"
    # Not rendezvous with c10d: where a machine is cut off, its torchrun would hang.
    "--master-addr=$first"
    "--master-port=$((20000 + SLURM_JOB_ID % 10000))"
)
# torchrun gives its ranks 30 seconds to stop; they use less, to say what took them so long.
job=(-m syncbn.train "run_dir=$run_dir" launch.stop_timeout_s=25 "$@")

# The number of a machine is known there alone. Where one torchrun fails, Slurm ends the others.
code=0
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" \
    bash -c 'exec "$@"' on-each "${torchrun[@]}" "${job[@]}" || code=$?

if grep -qs '"status": "interrupted"' "$run_dir/result.json"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
