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
#   SOME_HOME         folder of the repository            [the folder that sbatch was called in]
#   SOME_PYTHON       Python that runs the trainer        [.venv of the repository, else python3]
#   SOME_EXPERIMENT   experiment to run, name or YAML     [the launcher's]
#   SOME_DS_CONFIG    DeepSpeed JSON                      [ds_configs/zero2.json]
#   OMP_NUM_THREADS   threads of a task                   [its CPUs]
#
# Paths that are given, and the run's folder runs/EXPERIMENT, start at the job's working folder, which all nodes must
# share. A job that SLURM requeues continues from its last checkpoint, because the trainer resumes by default.
set -euo pipefail

refuse() {
	echo "error: $*" >&2
	exit 2
}

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
experiment=${SOME_EXPERIMENT:-$1}
shift

[[ -n ${SLURM_JOB_ID:-} ]] || refuse "not inside a SLURM job; submit the script with sbatch"

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

if [[ -n ${SOME_PYTHON:-} ]]; then
	python=$SOME_PYTHON
else
	# shellcheck source=/dev/null
	[[ ! -r $home/.venv/bin/activate ]] || source "$home/.venv/bin/activate"
	python=python3
fi

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

# srun takes neither --cpus-per-task from sbatch, nor the environment where sbatch was given --export=NONE.
# Nothing may follow: its exit code is the job's.
srun --ntasks="$tasks" --ntasks-per-node="$tasks_per_node" --cpus-per-task="$cpus_per_task" \
	"${gpu_options[@]}" --export=ALL --kill-on-bad-exit=1 \
	"$python" "$home/trainer/run.py" --ds_config "${SOME_DS_CONFIG:-$home/ds_configs/zero2.json}" \
	--experiment "$experiment" "$@"
