"""The nodes' network: a bridge on the machine, and for each node a network namespace with a cable to it."""

import fcntl
import json
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NETNS = Path("/run/netns")


@dataclass(frozen=True)
class Traffic:
    """What went through a node's cable, in bytes, all headers included."""

    sent: int
    received: int


@dataclass(frozen=True)
class Network:
    """Node i is `subnet`.(11 + i), the machine itself `subnet`.1; all names begin with `name`."""

    name: str
    """At most 10 letters, since the system allows 15 for an interface."""
    subnet: str
    """Three octets."""
    nodes: int

    @staticmethod
    def create(folder: Path, nodes: int) -> "Network":
        """Bring up a network that no other has; names and addresses follow from `folder` unless they are taken."""
        number = zlib.crc32(str(folder).encode())
        with _one_at_a_time():
            taken = ip("-o", "-4", "addr", "show") + ip("-4", "route", "show", "table", "all")
            free = (f"10.{128 + (number + i) // 256 % 128}.{(number + i) % 256}" for i in range(2**15))
            network = Network(f"c{number:08x}", next(subnet for subnet in free if f" {subnet}." not in taken), nodes)
            network.remove()
            network._add()
        return network

    @property
    def head(self) -> str:
        """The machine's address."""
        return f"{self.subnet}.1"

    @property
    def bridge(self) -> str:
        """The bridge's name."""
        return f"{self.name}br"

    def address(self, node: int) -> str:
        """A node's address."""
        return f"{self.subnet}.{11 + node}"

    def namespace(self, node: int) -> str:
        """A node's network namespace."""
        return f"{self.name}-node{node}"

    def cable(self, node: int) -> str:
        """The machine's end of a node's cable; the node's end is its eth0."""
        return f"{self.name}n{node}"

    def _add(self) -> None:
        ip("link", "add", self.bridge, "type", "bridge")
        ip("addr", "add", f"{self.head}/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")
        for node in range(self.nodes):
            namespace = self.namespace(node)
            ip("netns", "add", namespace)
            ip("link", "add", self.cable(node), "type", "veth", "peer", "name", "eth0", "netns", namespace)
            ip("link", "set", self.cable(node), "master", self.bridge, "up")
            ip("-n", namespace, "link", "set", "lo", "up")
            ip("-n", namespace, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
            ip("-n", namespace, "link", "set", "eth0", "up")

    def remove(self) -> None:
        """Remove whatever there is of it."""
        for namespace in NETNS.glob(f"{self.name}-node*"):
            ip("netns", "del", namespace.name)
        for link in json.loads(ip("-j", "link", "show") or "[]"):
            # Deleting a namespace takes its cable along, a moment later.
            if link["ifname"].startswith(self.name):
                subprocess.run(["ip", "link", "del", link["ifname"]], capture_output=True)

    def plug(self, node: int, is_in: bool) -> None:
        """Put a node's cable in, or pull it."""
        ip("link", "set", self.cable(node), "up" if is_in else "down")

    def shape(self, rate: str | None) -> None:
        """Limit what each node sends, `100mbit` for example; None = no limit."""
        for node in range(self.nodes):
            tc = ["tc", "-n", self.namespace(node), "qdisc"]
            subprocess.run([*tc, "del", "dev", "eth0", "root"], capture_output=True)
            if rate is not None:
                # A burst of 128 KB lasts for a millisecond at 1 Gbit/s; below that the token bucket misses its rate.
                limit = ["tbf", "rate", rate, "burst", "128kb", "latency", "50ms"]
                subprocess.run([*tc, "add", "dev", "eth0", "root", *limit], check=True)

    def traffic(self, node: int) -> Traffic:
        """What a node has sent and received so far; the other end of its cable counts the same in reverse."""
        counts = Path("/sys/class/net") / self.cable(node) / "statistics"
        sent, received = (int((counts / name).read_text(encoding="utf-8")) for name in ("rx_bytes", "tx_bytes"))
        return Traffic(sent, received)


def ip(*arguments: str) -> str:
    """What `ip` prints."""
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Clusters that come up at once must not choose the same free network."""
    with open(Path(tempfile.gettempdir()) / "some-cluster.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
