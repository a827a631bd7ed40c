#!/bin/bash
# The series a4, b1, b2, b3 (64 to 512 experts a layer) as a job array, one experiment a task. Submit it from the
# repository's folder and say which GPUs:
#
#   sbatch --exclusive --gpus-per-node=8 slurm/series_b.sh
#   sbatch --array=2,3%1 --exclusive --gpus-per-node=8 slurm/series_b.sh --set data.path=DIR     # b2, then b3
#
# No GPU is asked for here, so that the script also runs on CPU nodes. One task runs on each GPU (or --ntasks-per-node=N
# tasks, or one a CPU node). Arguments after the script go to trainer/run.py, the same for all; slurm/body.sh lists the
# variables. The runs go to runs/a4 to runs/b3.
#SBATCH --job-name=some-series-b
#SBATCH --array=0-3
#SBATCH --nodes=2
#SBATCH --time=08:00:00
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Seconds before the time limit at which the ranks (no B: here, or only this shell) are told to save and stop.
#SBATCH --signal=USR2@180
series=(a4 b1 b2 b3)

# sbatch runs a copy of this file, so the body is found from the folder that sbatch was called in.
body=${SOME_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/body.sh
[[ -r $body ]] || { echo "error: $body not found; call sbatch in the repository's folder or export SOME_HOME" >&2; exit 2; }

experiment=${series[${SLURM_ARRAY_TASK_ID:-4}]:-}
[[ -n $experiment ]] ||
	{ echo "error: task ${SLURM_ARRAY_TASK_ID:-(no array)} of the series does not exist; give --array=0-3 or a part of it" >&2; exit 2; }
for word in ${SOME_EXPERIMENT:+SOME_EXPERIMENT} "$@"; do
	[[ $word != SOME_EXPERIMENT && $word != --output_dir* ]] ||
		{ echo "error: $word would be one for all runs of the series; leave it out, and choose a folder with sbatch --chdir" >&2; exit 2; }
done
# shellcheck source=slurm/body.sh
source "$body" "$experiment" "$@"
