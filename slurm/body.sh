# shellcheck shell=bash
# The common body of the launchers beside it; they source it inside a SLURM batch job:
#
#   source body.sh EXPERIMENT [argument of trainer/run.py ...]
#
# srun starts one task a GPU on every node of the job, and each task is one rank: no other launcher is involved, and
# the trainer reads its rank from SLURM's variables. Tasks a node: --ntasks-per-node if sbatch was given it, else the
# node's GPUs, else 1. CPUs a task: --cpus-per-task, else an even share of the CPUs that the job got.
#
# Environment:
#   SOME_HOME          folder of the repository            [the folder that sbatch was called in]
#   SOME_PYTHON        Python that runs the trainer        [.venv of the repository, else python3]
#   SOME_EXPERIMENT    experiment to run, name or YAML     [the launcher's]
#   SOME_DS_CONFIG     DeepSpeed JSON                      [ds_configs/zero2.json]
#   SOME_CACHE_DIR     tokenised data                      [.cache/some in the job's working folder]
#   SOME_MAX_RESTARTS  restarts in a row without progress  [3]
#   OMP_NUM_THREADS    threads of a task                   [its CPUs]
#
# Paths that are given, and the run's folder runs/EXPERIMENT, start at the job's working folder, which all nodes must
# share.
#
# The job starts itself again, under the same id, and goes on from its last checkpoint: after the ranks saved and stopped for
# a signal, such as the notice before the time limit (exit code 75), and after a failure (any other). It ends for good when
# the run is done (0), when the trainer refused its input (2) or stopped for numbers that are not finite, which a restart
# would repeat (3), when it was cancelled, and when SOME_MAX_RESTARTS restarts in a row brought no new checkpoint (1). SLURM
# itself starts it again after preemption and when a node fails.
set -euo pipefail

refuse() {
	echo "error: $*" >&2
	exit 2
}

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
experiment=${SOME_EXPERIMENT:-$1}
shift

# The trainer is told its folder, so that both mean the same one.
run=$(basename "${experiment%.y*ml}")
run=runs/$run
for ((i = 1; i <= $#; i++)); do
	case ${!i} in
	--output_dir=*) run=${!i#*=} ;;
	--output_dir) run=${*:i+1:1} ;;
	esac
done

# No shell expands --output_dir=~/x, the trainer does.
if [[ $run == "~"* ]]; then
	user=${run%%/*} user_home=${HOME-}
	user=${user#"~"}
	[[ -z $user ]] || user_home=$(getent passwd "$user" | cut -d: -f6) || true
	[[ -z $user_home ]] || run=$user_home${run#"~$user"}
fi

[[ -n ${SLURM_JOB_ID:-} ]] || refuse "not inside a SLURM job; submit the script with sbatch"

max_restarts=${SOME_MAX_RESTARTS:-3}
[[ $max_restarts =~ ^[0-9]{1,9}$ ]] || refuse "SOME_MAX_RESTARTS=$max_restarts is no number; give one from 0"
max_restarts=$((10#$max_restarts)) # 08 is no octal

# --exclusive gives the job every GPU of its nodes, and a step only those that are asked for: ask for what sbatch was told,
# or for all. No binding of GPUs to tasks: a rank takes the GPU that its local rank names among the job's on the node.
gpus_per_node=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
gpus_per_node=${gpus_per_node##*:} # "h100:8" is 8
gpu_options=()
((gpus_per_node == 0)) || gpu_options=(--gpus-per-node="$gpus_per_node")

nodes=$SLURM_JOB_NUM_NODES
tasks_per_node=${SLURM_NTASKS_PER_NODE:-$((gpus_per_node > 0 ? gpus_per_node : 1))}
tasks=$((nodes * tasks_per_node))
[[ ${SLURM_NTASKS:-$tasks} -eq $tasks ]] ||
	refuse "--ntasks=$SLURM_NTASKS is not $tasks_per_node task(s) on each of $nodes node(s); give --ntasks-per-node instead"

# "4(x2),2" is 4 CPUs on each of two nodes and 2 on a third. Where a node has too few, srun would move tasks to others.
fewest_cpus=
for count in ${SLURM_JOB_CPUS_PER_NODE//,/ }; do
	count=${count%%(*}
	fewest_cpus=$((${fewest_cpus:-count} < count ? fewest_cpus : count))
done
cpus_per_task=${SLURM_CPUS_PER_TASK:-$((fewest_cpus / tasks_per_node))}
((cpus_per_task > 0 && cpus_per_task * tasks_per_node <= fewest_cpus)) ||
	refuse "$tasks_per_node task(s) a node do not fit the job's $fewest_cpus CPU(s) there;" \
		"give sbatch --exclusive, --cpus-per-gpu=N, or --ntasks-per-node=$tasks_per_node with --cpus-per-task=N"

# shellcheck source=slurm/python.sh
source "$home/slurm/python.sh"

# The ranks meet on the job's first node. Ports below 32768 are not handed out to clients by the system, and jobs
# that share a node have different ids.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus_per_task}

# A submitting shell's own ranks would pass for this job's; and srun would obey what sbatch was told about GPUs and their
# tasks, against the options below.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE LOCAL_SIZE
unset SLURM_CPUS_PER_GPU SLURM_GPUS SLURM_GPUS_PER_TASK SLURM_GPU_BIND SLURM_NTASKS_PER_GPU SLURM_TRES_PER_TASK

echo "job $SLURM_JOB_ID: $experiment, $nodes node(s) with $tasks_per_node task(s) of $cpus_per_task CPU(s)," \
	"rendezvous at $MASTER_ADDR:$MASTER_PORT"

export SOME_CACHE_DIR=${SOME_CACHE_DIR:-$PWD/.cache/some}

# The newest checkpoint, as its name and the identity of its folder.
newest_checkpoint() {
	local folder newest=none
	for folder in "$run"/checkpoints/step_*; do
		[[ ! -d $folder ]] || newest=${folder##*/}:$(stat --format=%i "$folder")
	done
	echo "$newest"
}

# What the job's attempts must know of each other: the newest checkpoint when the first began, when the last began, and how
# many in a row began at that step. Hidden files in the working folder; they go when the job ends.
notes=.slurm-${SLURM_JOB_NAME//\//_}-$SLURM_JOB_ID
((${SLURM_RESTART_COUNT:-0} > 0)) || rm -f "$notes".*
first=$(newest_checkpoint) before=$first attempt=1
if [[ -r $notes.attempts ]]; then
	read -r first last count <"$notes.attempts"
	[[ ${last%:*} != "${before%:*}" ]] || attempt=$((count + 1))
fi
echo "$first $before $attempt" >"$notes.attempts" || refuse "the job's working folder $PWD is not writable"

# Whoever asked for --resume never, or for another run's checkpoint, did not mean again at every restart.
resume=()
[[ $before == "$first" ]] || resume=(--resume auto)

# srun's exit code is the highest of its tasks', those that it killed included, so one that ends the job for good is told in
# this file as well.
export SOME_VERDICT_FILE=$PWD/$notes.verdict
rm -f "$SOME_VERDICT_FILE"

finish() {
	rm -f "$notes".*
	exit "$1"
}

give_up_without_progress() {
	echo "error: job $SLURM_JOB_ID: $attempt attempt(s) in a row began at checkpoint ${before%:*} and wrote no newer one;" \
		"it is not started again (SOME_MAX_RESTARTS=$max_restarts)" >&2
	finish 1
}
# An attempt may end without a word, with its node.
((attempt <= max_restarts + 1)) || give_up_without_progress

# srun takes neither --cpus-per-task from sbatch, nor the environment where sbatch was given --export=NONE.
srun --ntasks="$tasks" --ntasks-per-node="$tasks_per_node" --cpus-per-task="$cpus_per_task" \
	"${gpu_options[@]}" --export=ALL --kill-on-bad-exit=1 \
	"$python" "$home/trainer/run.py" --ds_config "${SOME_DS_CONFIG:-$home/ds_configs/zero2.json}" \
	--experiment "$experiment" "$@" --output_dir "$run" "${resume[@]}" &
srun=$!

# SLURM ends a job with SIGTERM for the ranks and for this shell, which then waits while they save. A notice that was meant
# for the ranks goes on to them.
is_ended=
trap 'is_ended=1' TERM
trap 'kill -USR2 "$srun"' USR2
code=0
wait "$srun" || code=$?
while kill -0 "$srun" 2>/dev/null; do
	code=0
	wait "$srun" || code=$?
done

# The id of an array's last task is also that of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# Cancelled, at its time limit, or being started again: all of that is SLURM's, and asking for a restart would undo a scancel.
# Only where it is being started again SLURM counts one restart more by now.
if [[ -n $is_ended ]]; then
	[[ $(scontrol show job "$job") != *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]] || finish "$code"
	exit "$code"
fi
[[ ! -e $SOME_VERDICT_FILE ]] || code=$(<"$SOME_VERDICT_FILE")
case $code in 0 | 2 | 3) finish "$code" ;; esac

after=$(newest_checkpoint)
[[ ${after%:*} != "${before%:*}" ]] || ((attempt <= max_restarts)) || give_up_without_progress
echo "job $SLURM_JOB_ID: ended with exit code $code at checkpoint ${after%:*}; it starts again"
# SLURM now ends this shell too, which must not keep it from asking.
trap '' TERM
scontrol requeue "$job" || finish "$code"
exit "$code"
