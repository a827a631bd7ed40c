#!/bin/bash
# Published runs as a job array: one run of tools/reproduce.py a task. Submit it from the repository's folder:
#
#   python tools/reproduce.py v3-1-v1 v4-a4 --seeds 3 --task list          # the runs and how many they are: 6
#   sbatch --array=0-5 --gpus-per-node=1 --cpus-per-task=8 slurm/reproduce.sh v3-1-v1 v4-a4 --seeds 3
#   python tools/reproduce.py v3-1-v1 v4-a4 --seeds 3 --collect            # the table, at any time
#
# Arguments after the script go to tools/reproduce.py. A task is one process on one node; --gpus-per-node=4 with --ranks 4
# makes it four. No GPU is asked for here, so that the script also runs on CPU nodes. Without --array one job does all runs,
# one after the other. The runs go to runs/reproduce, which all nodes must share; a task that SLURM requeues goes on from its
# last checkpoint. At its time limit a job ends for good: submit it again, and what is finished stays.
#
# Environment: SOME_HOME (the repository, if you submit from elsewhere), SOME_PYTHON (default: .venv of the repository, else
# python3), SOME_CACHE_DIR (tokenised data; default: .cache/some in the job's working folder).
#SBATCH --job-name=some-reproduce
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

# sbatch runs a copy of this file, so the tool is found from the folder that sbatch was called in.
home=${SOME_HOME:-${SLURM_SUBMIT_DIR:-.}}
tool=$home/tools/reproduce.py
[[ -r $tool ]] || { echo "error: $tool not found; call sbatch in the repository's folder or export SOME_HOME" >&2; exit 2; }
[[ -n ${SLURM_JOB_ID:-} ]] || { echo "error: not inside a SLURM job; submit the script with sbatch" >&2; exit 2; }

# shellcheck source=slurm/python.sh
source "$home/slurm/python.sh"

# The ranks of a submitting shell would pass for this job's. The tool starts its own on this node, without srun.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE LOCAL_SIZE

export SOME_CACHE_DIR=${SOME_CACHE_DIR:-$PWD/.cache/some}

task=()
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || task=(--task "$SLURM_ARRAY_TASK_ID")

# In this shell's place, so that SLURM's signals reach the tool and its exit code is the task's.
exec "$python" "$tool" "$@" "${task[@]}"
