#!/bin/bash
# Experiment a4: 64 experts a layer. Submit it from the repository's folder and say which GPUs:
#
#   sbatch --exclusive --gpus-per-node=8 slurm/a4_64experts.sh
#   sbatch --nodes=1 --gpus-per-node=2 --cpus-per-gpu=8 slurm/a4_64experts.sh --set data.path=DIR
#
# No GPU is asked for here, so that the script also runs on CPU nodes. One task runs on each GPU (or --ntasks-per-node=N
# tasks, or one a CPU node). Arguments after the script go to trainer/run.py; slurm/body.sh lists the variables.
#SBATCH --job-name=some-a4
#SBATCH --nodes=1
#SBATCH --time=04:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Seconds before the time limit at which the ranks (no B: here, or only this shell) are told to save and stop.
#SBATCH --signal=USR2@180

# sbatch runs a copy of this file, so the body is found from the folder that sbatch was called in.
body=${SOME_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/body.sh
[[ -r $body ]] || { echo "error: $body not found; call sbatch in the repository's folder or export SOME_HOME" >&2; exit 2; }
# shellcheck source=slurm/body.sh
source "$body" a4 "$@"
