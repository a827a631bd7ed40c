"""A real SLURM on this machine, to play with.

python -m tests.cluster up 3               three nodes; needs root and Debian's packages
python -m tests.cluster run srun -N3 hostname
python -m tests.cluster crash node1
python -m tests.cluster down
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.cluster.cluster import Cluster


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description="A real SLURM on this machine.")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/some-cluster"), help="default /tmp/some-cluster")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a cluster")
    up.add_argument("nodes", type=int, nargs="?", default=2)
    up.add_argument("--cpus", type=int, default=2, help="of a node; may be more than the machine has")
    up.add_argument("--gpus", type=int, default=0, help="of a node; each a /dev/null")
    for name, text in {
        "down": "end it",
        "status": "nodes and jobs",
        "traffic": "bytes that each node sent and received",
    }.items():
        commands.add_parser(name, help=text)
    for name, text in {
        "crash": "cut the power of",
        "boot": "start",
        "unplug": "pull the cable of",
        "plug": "plug in",
    }.items():
        commands.add_parser(name, help=f"{text} a node").add_argument("node")
    commands.add_parser("shape", help="limit what nodes send").add_argument("rate", help="100mbit, for example, or off")
    commands.add_parser("wait", help="wait for a job's end").add_argument("job")
    run = commands.add_parser("run", help="run a command on the login node, such as sbatch")
    execute = commands.add_parser("exec", help="run a command on a node")
    execute.add_argument("node")
    for parser_of_words in (run, execute):
        parser_of_words.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    chosen = parser.parse_args(arguments)

    try:
        if chosen.command == "up":
            Cluster.up(chosen.folder, chosen.nodes, chosen.cpus, chosen.gpus)
            print(f"export SLURM_CONF={chosen.folder}/slurm.conf")
            return 0
        act(_pick_up(chosen.folder), chosen)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(error.output, end="", file=sys.stderr)
        return error.returncode
    return 0


def _pick_up(folder: Path) -> Cluster:
    try:
        return Cluster(folder)
    except FileNotFoundError as error:
        raise ValueError(f"no cluster in {folder} ({error}); start one with up") from None


def act(cluster: Cluster, chosen: argparse.Namespace) -> None:
    """One command on a cluster that is up."""
    if not getattr(chosen, "words", [chosen.command]):
        raise ValueError(f"{chosen.command}: which command? for example {chosen.command} hostname")
    match chosen.command:
        case "down":
            cluster.down()
        case "status":
            print(cluster.run("sinfo", "--Node"), cluster.run("squeue"), sep="", end="")
        case "traffic":
            for number, node in enumerate(cluster.nodes):
                traffic = cluster.network.traffic(number)
                print(f"{node} sent {traffic.sent:,} received {traffic.received:,}")
        case "crash" | "boot" | "unplug" | "plug":
            getattr(cluster, chosen.command)(chosen.node)
        case "shape":
            cluster.network.shape(None if chosen.rate == "off" else chosen.rate)
        case "wait":
            print(cluster.wait(chosen.job, seconds=float("inf")))
        case "run":
            os.execvpe(chosen.words[0], chosen.words, {**os.environ, "SLURM_CONF": str(cluster.configuration)})
        case "exec":
            print(cluster.execute(chosen.node, *chosen.words, timeout=3600), end="")


if __name__ == "__main__":
    sys.exit(main())
