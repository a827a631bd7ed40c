"""A cluster: munged, slurmctld and a slurmd a node, with faults to try on them.

A node has its own network, host name, process numbers, /proc, /dev/shm and /etc/hosts; files and users are the machine's, so
all storage is shared. Commands such as sbatch and srun work from the machine itself, which is the login node.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.cluster.config import write_config
from tests.cluster.network import Network
from tests.cluster.processes import ProcessTable, first_child, wait_until

PROGRAMS = {
    "munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "ip": "iproute2",
    "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "mount": "mount",
}  # fmt: skip
"""What a cluster runs, and Debian's package of it."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
UP = {"idle", "mix", "alloc", "comp"}
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}
NODE_PROGRAM = Path(__file__).with_name("node.py")


def why_not() -> str | None:
    """Why this machine cannot have a cluster; None if it can."""
    if os.geteuid() != 0:
        return "a SLURM cluster needs root"
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program, path=PATH) is None})
    if missing:
        return f"a SLURM cluster needs Debian's packages {' '.join(missing)}"
    probe = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "ip", "link", "add", "probe", "type", "bridge"]
    result = subprocess.run(probe, capture_output=True, text=True, env={"PATH": PATH})
    return f"a SLURM cluster needs network namespaces: {result.stderr.strip()}" if result.returncode else None


@dataclass(frozen=True)
class Ending:
    """How a job ended."""

    state: str
    """COMPLETED, FAILED, CANCELLED, TIMEOUT, ..."""
    exit_code: str
    """The batch script's `code:signal`. A job may be CANCELLED or TIMEOUT with 0:0."""
    restarts: int
    """How often it was requeued."""


class Cluster:
    """A cluster that is up. All of it lies in `folder`, and any process may pick it up there."""

    def __init__(self, folder: Path) -> None:
        """Pick up what `up` has started.

        Raises:
            FileNotFoundError: nothing is up in `folder`.
        """
        self.folder = folder
        self.network = Network(**json.loads((folder / "network.json").read_text(encoding="utf-8")))
        self._processes = ProcessTable(folder / "pids")

    @staticmethod
    def up(folder: Path, nodes: int = 2, cpus: int = 2, gpus: int = 0, launch_parameters: str = "") -> "Cluster":
        """Start a cluster and wait until its nodes are idle.

        Args:
            folder: absolute, short (sockets lie in it), new or empty; every folder above it must be closed to other
                users' writing or sticky like /tmp, or munged refuses.
            nodes: nodes, called node0, node1 and so on.
            cpus: CPUs that a node claims; may be more than the machine has.
            gpus: GPUs that a node claims; each is a /dev/null.
            launch_parameters: slurm.conf's LaunchParameters.

        Raises:
            RuntimeError: this machine cannot have one, one is up in `folder`, or a daemon does not start.
            TimeoutError: a daemon does not answer.
        """
        if (reason := why_not()) is not None:
            raise RuntimeError(reason)
        if (folder / "network.json").exists():
            raise RuntimeError(f"a cluster is up in {folder}; end it with down, or give another --folder")
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        network = Network.create(folder, nodes)
        (folder / "network.json").write_text(json.dumps(asdict(network)), encoding="utf-8")
        write_config(folder, network, cpus, gpus, launch_parameters)
        cluster = Cluster(folder)
        try:
            cluster._start_daemons()
        except BaseException:
            cluster.down()
            raise
        return cluster

    def _start_daemons(self) -> None:
        munge = self.folder / "munge"
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._start("munged", ["munged", "--foreground", *(f"--{flag}={munge / name}" for flag, name in files.items())])
        wait_until((munge / "socket").exists, 20, "munged's socket")
        # SLURM compares its configuration with the host name, so the head has one of its own.
        named = 'hostname head && mount --bind "$1" /etc/hosts && exec slurmctld -D'
        self._start(
            "slurmctld", ["unshare", "--uts", "--mount", "sh", "-c", named, "sh", str(self.folder / "hosts" / "head")]
        )
        for node in self.nodes:
            self._start_node(node)
        self.wait_for_nodes()

    def _start(self, name: str, command: list[str]) -> None:
        # A calling job's variables must not reach the daemons, whose jobs would inherit them.
        environment = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", "SLURM_CONF": str(self.configuration)}
        self._processes.start(name, command, environment, self.folder / "log" / f"{name}.out")

    def _start_node(self, node: str) -> None:
        spaces = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child"]
        program = [sys.executable, "-I", "-S", str(NODE_PROGRAM), node, str(self.folder)]
        self._start(node, ["ip", "netns", "exec", self.network.namespace(self._number(node)), *spaces, *program])

    def down(self) -> None:
        """End everything, jobs first: a waiting srun hangs when its controller vanishes."""
        if self._processes.pid("slurmctld") is not None:
            with suppress(subprocess.SubprocessError, TimeoutError):
                self.run("scancel", "--user=root", timeout=10)
                wait_until(lambda: not self.run("squeue", "--noheader", timeout=10).strip(), 10, "the end of all jobs")
        for node in self.nodes:
            if (pid := self._node_pid(node)) is not None:
                os.kill(pid, signal.SIGTERM)
        for name in self._processes.names():
            self._processes.stop(name, signal.SIGKILL if name in self.nodes else signal.SIGTERM)
        self.network.remove()
        (self.folder / "network.json").unlink()

    @property
    def configuration(self) -> Path:
        """slurm.conf; every client needs it as SLURM_CONF."""
        return self.folder / "slurm.conf"

    @property
    def nodes(self) -> list[str]:
        """The nodes' names."""
        return [f"node{number}" for number in range(self.network.nodes)]

    def _number(self, node: str) -> int:
        if node not in self.nodes:
            raise ValueError(f"{node}: no such node; there are {', '.join(self.nodes)}")
        return self.nodes.index(node)

    def _node_pid(self, node: str) -> int | None:
        """The node's pid 1 as the machine numbers it."""
        pid = self._processes.pid(node)
        return None if pid is None else first_child(pid)

    # Jobs

    def run(
        self, *command: str, cwd: Path | None = None, environment: dict[str, str] | None = None, timeout: float = 120
    ) -> str:
        """What a command on the login node prints, `srun -N2 hostname` for example.

        Raises:
            subprocess.CalledProcessError: it failed; its output is in the message.
        """
        variables = dict(os.environ) if environment is None else environment
        result = subprocess.run(
            command,
            env=variables | {"SLURM_CONF": str(self.configuration)},
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        if result.returncode:
            error = subprocess.CalledProcessError(result.returncode, command, result.stdout)
            error.add_note(result.stdout)
            raise error
        return result.stdout

    def submit(self, *arguments: str, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
        """`sbatch` with these arguments; the job's id."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, environment=environment).strip()

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, seconds: float = 300) -> Ending:
        """Wait for a job's end.

        Raises:
            TimeoutError: it has not ended within `seconds`.
        """
        wait_until(lambda: self.show(job)["JobState"] in OVER, seconds, f"the end of job {job}", every=0.25)
        last = self.show(job)
        return Ending(last["JobState"], last["ExitCode"], int(last["Restarts"]))

    # Nodes

    def node_states(self) -> dict[str, str]:
        """Each node's state as `sinfo` has it; `down*` is one that does not answer."""
        return dict(line.split() for line in self.run("sinfo", "--noheader", "--Node", "--format=%N %t").splitlines())

    def wait_for_nodes(self, seconds: float = 60) -> None:
        """Wait until every node can take jobs.

        Raises:
            RuntimeError: a daemon has ended.
            TimeoutError: it takes longer than `seconds`.
        """

        def ready() -> bool:
            for name in self._processes.names():
                if self._processes.pid(name) is None:
                    lines = (self.folder / "log" / f"{name}.out").read_text(encoding="utf-8").splitlines()
                    raise RuntimeError(f"{name} has ended: {' / '.join(lines[-5:])}")
            try:
                return set(self.node_states().values()) <= UP
            except subprocess.CalledProcessError:
                return False  # the controller does not listen yet

        wait_until(ready, seconds, "idle nodes", every=0.1)

    def execute(self, node: str, *command: str, timeout: float = 60) -> str:
        """What a command on a node prints."""
        pid = self._node_pid(node)
        if pid is None:
            raise RuntimeError(f"{node} is not running")
        return self.run("nsenter", "-t", str(pid), "-n", "-u", "-m", "-p", *command, timeout=timeout)

    def crash(self, node: str) -> None:
        """Cut a node's power: everything on it is gone at once, with its cable dead."""
        self.network.plug(self._number(node), is_in=False)
        self._processes.stop(node, signal.SIGKILL)

    def boot(self, node: str) -> None:
        """Start a crashed node again.

        SLURM would miss a crash that is over before it looks at the node, and its jobs would hang, so it is told.
        """
        if self._processes.pid(node) is not None:
            raise RuntimeError(f"{node} is running")
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=crashed")
        self.network.plug(self._number(node), is_in=True)
        self._start_node(node)

    def unplug(self, node: str) -> None:
        """Pull a node's network cable."""
        self.network.plug(self._number(node), is_in=False)

    def plug(self, node: str) -> None:
        """Put it back."""
        self.network.plug(self._number(node), is_in=True)
