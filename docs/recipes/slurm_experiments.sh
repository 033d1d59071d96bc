#!/usr/bin/env bash
# sbatch docs/recipes/slurm_experiments.sh defaults
#SBATCH --array=0-4
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
# Each task makes the runs of one environment of the list, and resumes them if it is started again. `defaults` has 13
# environments: add the others to the list, and set --array to 0-<length - 1>.
set -eu
envs=(CartPole-v1 Acrobot-v1 Pendulum-v1 Hopper-v5 HalfCheetah-v5)
exec python -m tests.bench experiments "$@" --envs "${envs[SLURM_ARRAY_TASK_ID]}" --jobs "${SLURM_CPUS_PER_TASK:-1}"
