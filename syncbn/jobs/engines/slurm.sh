#!/bin/bash
# Goes on with a run of the job service: sbatch slurm.sh PYTHON RANKS COUNT ARGUMENT...
#
# RANKS is how many ranks each machine has; the ARGUMENTs are those of syncbn.train.launch.batch, of
# an array COUNT of them for each task. On one machine this process becomes the supervisor; of
# several, each gets a torchrun.
set -euo pipefail

python=$1 ranks=$2 count=$3
shift 3
first=$((${SLURM_ARRAY_TASK_ID:-0} * count + 1))
batch=("$python" -m syncbn.train.launch.batch "${@:first:count}")

if [ "$SLURM_JOB_NUM_NODES" = 1 ]; then
    exec "${batch[@]}"
fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# One torchrun that fails ends all.
exec srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" "${batch[@]}" \
    --nodes "$SLURM_JOB_NUM_NODES" --ranks "$ranks" \
    --master-addr "$first" --master-port "$((20000 + SLURM_JOB_ID % 10000))"
