"""The first process of a node: run by path as pid 1 of the node's namespaces, with the node's name and the cluster's folder.

It gives the node its own host name, /proc, /etc/hosts and /dev/shm, starts slurmd, collects orphans, and ends with slurmd.
When it dies the kernel kills everything on the node.
"""

import os
import signal
import socket
import subprocess
import sys


def main(name: str, folder: str) -> int:
    """Be the node; slurmd's exit status."""
    socket.sethostname(name)
    subprocess.run(["mount", "-t", "proc", "proc", "/proc"], check=True)
    subprocess.run(["mount", "--bind", f"{folder}/hosts/{name}", "/etc/hosts"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm"], check=True)
    slurmd = subprocess.Popen(["slurmd", "-D", "-N", name])
    signal.signal(signal.SIGTERM, lambda *_: slurmd.terminate())
    while True:
        pid, status = os.wait()
        if pid == slurmd.pid:
            return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
