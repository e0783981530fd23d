#!/usr/bin/env bash
# Train on two machines of a Slurm cluster: `sbatch slurm.sh [override ...]`; see README.md.
#
# Two minutes before the time is up, the job writes its state and queues itself again; then it goes
# on where it was. It does so too, from its newest checkpoint, where a machine was lost.
#
#SBATCH --job-name=syncbn
#SBATCH --nodes=2
# One torchrun a machine, which starts the ranks there.
#SBATCH --ntasks-per-node=1
# Change the next three. Without GPUs leave out the first.
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
# To all processes but this script's own.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=syncbn-%j.log
set -euo pipefail

# Change these: the ranks of a machine, which are its GPUs as a rule; where Python is; and a
# directory that all machines reach. A job that is queued again has the same number as before, and
# so goes on in the same directory.
ranks=1
PATH="$SLURM_SUBMIT_DIR/.venv/bin:$PATH"
run_dir="$SLURM_SUBMIT_DIR/runs/slurm-$SLURM_JOB_ID"

# What the attempt before left is not to be taken for this one's, which keeps it with the others.
result() {
    cat "$run_dir/result.json" 2> /dev/null || true
}
before=$(result)
interrupted() {
    [[ $(result) != "$before" ]] && grep -qs '"status": "interrupted"' "$run_dir/result.json"
}

# Without torchrun's c10d rendezvous: nothing is elastic here, and where the network fails, its
# torchruns hang until Slurm kills them.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
torchrun=(
    "--nnodes=$SLURM_JOB_NUM_NODES"
    "--nproc-per-node=$ranks"
    "--master-addr=$first"
    "--master-port=$((20000 + SLURM_JOB_ID % 10000))"
)
# torchrun kills ranks that take longer than 30 s to stop; before that they say what keeps them.
job=(-m syncbn.train "run_dir=$run_dir" launch.stop_timeout_s=25 "$@")

code=0
# A machine knows its own number alone, hence the shell there. One torchrun that fails ends all.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    bash -c 'exec torchrun "--node-rank=$SLURM_NODEID" "$@"' on-machine \
    "${torchrun[@]}" "${job[@]}" || code=$?

if interrupted; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
