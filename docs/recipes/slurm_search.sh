#!/usr/bin/env bash
# sbatch docs/recipes/slurm_search.sh --env CartPole-v1 -n 50000
#SBATCH --array=0-7
#SBATCH --cpus-per-task=1
#SBATCH --time=24:00:00
# All tasks share the study, in a file that may lie on a network file system.
set -eu
exec python -m sb3_clipvf train -optimize --max-total-trials 200 --study-name search --storage search.log "$@"
