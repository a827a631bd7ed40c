#!/bin/bash
# A grid over settings of an experiment as a job array, one run a task. Submit it from the repository's folder:
#
#   python tools/grid.py a4 --grid train.learning_rate=3e-4,6e-4 --grid seed=0,1,2        # the runs, and how many: 6
#   sbatch --array=0-5 --exclusive --gpus-per-node=8 slurm/sweep.sh a4 --grid train.learning_rate=3e-4,6e-4 --grid seed=0,1,2
#
# No GPU is asked for here, so that the script also runs on CPU nodes. One task runs on each GPU (or --ntasks-per-node=N
# tasks, or one a CPU node). Arguments after the script go to tools/grid.py, which hands on what trainer/run.py takes;
# slurm/body.sh lists the variables. The runs go to runs/sweep/EXPERIMENT/KEY=VALUE,...
#SBATCH --job-name=some-sweep
#SBATCH --nodes=1
#SBATCH --time=04:00:00
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Seconds before the time limit at which the ranks (no B: here, or only this shell) are told to save and stop.
#SBATCH --signal=USR2@180

# sbatch runs a copy of this file, so the body is found from the folder that sbatch was called in.
home=${SOME_HOME:-${SLURM_SUBMIT_DIR:-.}}
body=$home/slurm/body.sh
[[ -r $body ]] || { echo "error: $body not found; call sbatch in the repository's folder or export SOME_HOME" >&2; exit 2; }

# shellcheck source=slurm/python.sh
source "$home/slurm/python.sh"
# The experiment and the trainer's arguments, each ended by a null byte.
mapfile -d '' -t words < <("$python" "$home/tools/grid.py" "$@" --task)
((${#words[@]} > 0)) || exit 2 # grid.py has said why
# shellcheck source=slurm/body.sh
source "$body" "${words[@]}"
