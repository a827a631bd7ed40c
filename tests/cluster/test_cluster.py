"""The cluster itself: faults are real, clusters side by side do not meet, and nothing stays behind."""

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.__main__ import main
from tests.cluster.cluster import Cluster
from tests.cluster.processes import wait_until

# Two programs that `python -c` runs on nodes; no packages.
PYTHON = (sys.executable, "-I", "-S", "-c")
TAKE_ALL = """
import socket
connection, _ = socket.create_server(("", 5555)).accept()
while connection.recv(1 << 16): pass
"""
SEND = """
import socket, sys, time
deadline = time.monotonic() + 20
while True:
    try:
        connection = socket.create_connection((sys.argv[1], 5555), 2)
        break
    except ConnectionRefusedError:
        if time.monotonic() > deadline: raise
connection.sendall(bytes(int(sys.argv[2])))
connection.shutdown(socket.SHUT_WR)
connection.recv(1)
"""


def belongings(cluster: Cluster) -> list[str]:
    """Namespaces, interfaces and processes of the machine that belong to a cluster."""
    listings = [["ip", "netns"], ["ip", "-o", "link"]]
    lines = [line for listing in listings for line in subprocess.check_output(listing, text=True).splitlines()]
    return [line for line in lines + command_lines() if cluster.network.name in line or str(cluster.folder) in line]


def command_lines() -> list[str]:
    """Of every process of the machine."""
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            lines.append(process.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip())
    return lines


def leave_running(cluster: Cluster, node: str, *command: str) -> None:
    """Start a program on a node that stays when the command that started it has ended."""
    cluster.execute(node, "sh", "-c", 'setsid --fork "$@" >/dev/null 2>&1', "sh", *command)
    # setsid does not wait until its child has become the program.
    wait_until(lambda: " ".join(command).strip() in command_lines(), 240, f"{command[0]} on {node}")


def test_clusters_side_by_side_do_not_meet_and_leave_nothing_behind(cluster, capfd):
    folder = Path(tempfile.mkdtemp(prefix="some-cluster-"))
    try:
        assert main(["--folder", str(folder), "up", "1"]) == 0
        other = Cluster(folder)
        assert main(["--folder", str(folder), "up", "1"]) == 1
        assert f"a cluster is up in {folder}; end it with down" in capfd.readouterr().err
        assert other.network.subnet != cluster.network.subnet
        for each in (cluster, other):
            said = each.run("srun", f"--nodes={len(each.nodes)}", "hostname", timeout=240).split()
            assert sorted(said) == each.nodes
        assert main(["--folder", str(folder), "exec", "node0", "hostname"]) == 0
        assert capfd.readouterr().out.endswith("node0\n")
        for words, said in (["run", "no-such-command"], "No such file or directory"), (["run"], "run: which command?"):
            assert main(["--folder", str(folder), *words]) == 1
            error = capfd.readouterr().err
            assert said in error and "no cluster" not in error
        # A job, and a program that hides from SLURM.
        job = other.submit("--wrap=sleep 600", cwd=folder)
        wait_until(lambda: other.show(job)["JobState"] == "RUNNING", 240, "the job")
        leave_running(other, "node0", "sh", "-c", "sleep 600; :", f"hidden in {folder}")
        assert [line for line in belongings(other) if "hidden in" in line]

        assert main(["--folder", str(folder), "down"]) == 0
        wait_until(lambda: not belongings(other), 10, "an empty machine")
        assert main(["--folder", str(folder), "status"]) == 1
        assert f"no cluster in {folder}" in capfd.readouterr().err
    finally:
        shutil.rmtree(folder)
    assert set(cluster.node_states().values()) == {"idle"}, "the other cluster went along"


def test_cables_carry_what_is_counted_until_they_are_pulled(cluster):
    before = [cluster.network.traffic(node) for node in (0, 1)]
    leave_running(cluster, "node1", *PYTHON, TAKE_ALL)
    cluster.execute("node0", *PYTHON, SEND, "node1", "2000000")
    after = [cluster.network.traffic(node) for node in (0, 1)]
    # Headers are 66 bytes of 1,514 at most; segments may be larger on the way.
    assert 2_000_000 < after[0].sent - before[0].sent < 2_200_000
    assert 2_000_000 < after[1].received - before[1].received < 2_200_000

    cluster.unplug("node1")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        cluster.execute("node0", *PYTHON, SEND, "node1", "1")
    assert "timed out" in failed.value.output
    cluster.plug("node1")

    cluster.network.shape("80mbit")
    for node in (0, 1):
        rate = ["tc", "-n", cluster.network.namespace(node), "qdisc", "show", "dev", "eth0"]
        assert "rate 80Mbit" in subprocess.check_output(rate, text=True)
    cluster.network.shape(None)
    assert "tbf" not in subprocess.check_output(rate, text=True)


def test_a_crash_ends_everything_on_a_node_at_once(cluster):
    seconds = f"600.{os.getpid()}"  # no other process of the machine sleeps as long
    leave_running(cluster, "node1", "sleep", seconds)
    assert f"sleep {seconds}" in command_lines()
    cluster.crash("node1")
    assert f"sleep {seconds}" not in command_lines()
    with pytest.raises(RuntimeError, match="node1 is not running"):
        cluster.execute("node1", "true")
    with pytest.raises(ValueError, match="node7: no such node; there are node0, node1"):
        cluster.crash("node7")
    cluster.boot("node1")
    cluster.wait_for_nodes()
    with pytest.raises(RuntimeError, match="node1 is running"):
        cluster.boot("node1")
    assert cluster.run("srun", "--nodelist=node1", "hostname", timeout=240).split() == ["node1"]
