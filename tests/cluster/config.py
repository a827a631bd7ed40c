"""What SLURM's daemons of one cluster read."""

import os
import time
from pathlib import Path

from tests.cluster.network import Network

SLURM_CONF = """
ClusterName=test
SlurmctldHost=head({head})
# At that address only, so that clusters side by side can use the same port.
CommunicationParameters=NoCtldInAddrAny
SlurmctldPort=6817
SlurmdPort=6818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job is held back until credentials of its last start have expired.
AuthInfo=socket={folder}/munge/socket,cred_expire={cred_expire}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/spool/slurmctld.pid
SlurmdPidFile={folder}/spool/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
# Not the default, control groups: where they cannot be written every launch fails, with exit code 0.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
{launch_parameters}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Nodes may have more CPUs than the machine.
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout={slurmd_timeout}
KillWait={kill_wait}
MessageTimeout=10
MinJobAge=3600
FirstJobId={first_job}
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=60 PriorityTier=2 PreemptMode=OFF
"""
CRED_EXPIRE = 5
SLURMD_TIMEOUT = 15
"""Seconds after which a node that does not answer is down and its jobs are requeued; it is looked at every 30."""
KILL_WAIT = 15
"""Seconds between SIGTERM and SIGKILL, default 30."""


def write_config(folder: Path, network: Network, cpus: int, gpus: int, launch_parameters: str = "") -> None:
    """slurm.conf and what it needs, into a new cluster's folder."""
    nodes = range(network.nodes)
    for name in ("munge", "state", "log", "pids", "dev", "hosts", *(f"spool/node{node}" for node in nodes)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    key = folder / "munge" / "key"
    key.touch(0o600)
    key.write_bytes(os.urandom(1024))

    names = {"head": network.head} | {f"node{node}": network.address(node) for node in nodes}
    for host in names:
        # As Debian has it: a host's own name leads to the host alone, and not to its address in the network.
        own = names if host == "head" else names | {host: "127.0.1.1"}
        text = "".join(f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **own}.items())
        (folder / "hosts" / host).write_text(text, encoding="utf-8")

    text = SLURM_CONF.format(
        head=network.head,
        folder=folder,
        cred_expire=CRED_EXPIRE,
        slurmd_timeout=SLURMD_TIMEOUT,
        kill_wait=KILL_WAIT,
        launch_parameters=f"LaunchParameters={launch_parameters}" if launch_parameters else "",
        # Not the ids of a cluster before: a srun that outlived it would end jobs of the same number.
        first_job=int(time.time()) % 60_000 * 1_000 + 1,
    )
    with open("/proc/meminfo", encoding="utf-8") as file:
        megabytes = int(file.readline().split()[1]) * 9 // 10 // 1024
    shape = f"CPUs={cpus} Sockets=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory={megabytes}"
    if gpus:
        text += "GresTypes=gpu\n"
        shape += f" Gres=gpu:{gpus}"
        for gpu in range(gpus):
            os.mknod(folder / "dev" / f"gpu{gpu}", 0o020666, os.makedev(1, 3))  # each one more /dev/null
        # CUDA_VISIBLE_DEVICES is set only with the flag where there is no driver.
        devices = f"Name=gpu File={folder}/dev/gpu[0-{gpus - 1}] Flags=nvidia_gpu_env\n"
        (folder / "gres.conf").write_text(devices, encoding="utf-8")
    text += "".join(f"NodeName=node{node} NodeAddr={network.address(node)} {shape}\n" for node in nodes)
    (folder / "slurm.conf").write_text(text, encoding="utf-8")
    # slurmd loads this plugin even if nothing uses it; version 1 touches nothing until then, version 2 is fatal here.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n", encoding="utf-8")
