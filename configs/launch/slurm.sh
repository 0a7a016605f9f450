#!/bin/bash
# One process per GPU of a SLURM cluster; JAX finds the others through SLURM by itself, and under
# SLURM gives each process one device, that of its number on the node.
#
#     sbatch --nodes 4 configs/launch/slurm.sh configs/lm_1b.py --config.data.source.path "text/*.jsonl"
#
# The run folder must be on a file system that all nodes share. When the time limit comes near,
# SLURM sends SIGTERM: the step under way is saved, the job queues itself again and goes on.

#SBATCH --job-name=causal_jax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u
config=$1
shift
srun --kill-on-bad-exit=1 python -m causal_jax.train --config "$config" --distributed "$@"
code=$?
# stopped by the signal and saved: queue again
if [ $code = 0 ] && tail -n 20 "$SLURM_JOB_NAME-$SLURM_JOB_ID.log" | grep -q "the same command goes on"; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
