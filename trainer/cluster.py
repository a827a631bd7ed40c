"""Machines as the cost model sees them: a few figures a rank, read from YAML (`tools/machines.yaml` holds common ones)."""

import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.plain_yaml import type_name
from trainer.plan import GIB, Sent
from trainer.precision import BF16, FP32, MIN_SPEEDUP
from trainer.text import read_yaml

DEVICES = ("cuda", "cpu")
SHARES = ("share_by_rows", "expert_share_by_rows")
KINDS = {
    float: ((int, float), "a number"),
    int: ((int,), "a whole number"),
    str: ((str,), "text"),
    dict[int, float]: ((dict,), "rows and shares"),
}
"""What YAML may hold for a field's type, and how an error calls it."""


@dataclass(frozen=True)
class Machine:
    """One kind of node. Every figure is that of one rank while all ranks of the node are busy."""

    describe: str
    """What it is, in words."""
    device: str
    """`cuda` or `cpu`."""
    ranks_per_node: int
    """Ranks (GPUs) on a node."""
    memory_gib: float
    """Memory of a rank, GiB."""
    reserved_gib: float
    """Part of it that the driver, the libraries and the allocator keep, GiB."""
    bf16_tflops: float
    """Peak of dense bf16 products, 1e12 FLOP/s."""
    fp32_tflops: float
    """Peak of fp32 products without TF32, 1e12 FLOP/s."""
    share_by_rows: dict[int, float]
    """Rows of a trained map to the share of the peak that it reaches, forward and backward; between them, by logarithm."""
    expert_share_by_rows: dict[int, float]
    """Rows of a frozen expert to the share of the peak that the kernel of the experts reaches, forward and backward."""
    attention_share: float
    """The same of fused attention, forward and backward (on a cpu, of the fp32 peak)."""
    memory_gb_s: float
    """Bandwidth of memory as achieved, 1e9 bytes/s."""
    elementwise_gb_s: float
    """The same of norms, GELU, softmax and their gradients, which on CPUs compute longer than they read, 1e9 bytes/s."""
    in_node_gb_s: float
    """What a rank sends to ranks of its node as achieved, 1e9 bytes/s in one direction."""
    in_node_us: float
    """Latency of a message there, microseconds."""
    between_nodes_gb_s: float
    """What a rank sends to other nodes as achieved, 1e9 bytes/s in one direction."""
    between_nodes_us: float
    """Latency of a message there, microseconds."""
    host_gb_s: float
    """Bandwidth between a rank and host memory, for an offloaded optimizer, 1e9 bytes/s."""
    step_us: float
    """Fixed time of an optimizer step (DeepSpeed's hooks and Python), microseconds."""
    layer_us: float
    """Fixed time of one block, forward and backward (launches of kernels, Python), microseconds."""
    expert_us: float
    """Fixed time of one expert that has any rows, forward and backward, microseconds."""

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ValueError(f"device = {self.device!r} is not one of: {', '.join(DEVICES)}")
        for field in dataclasses.fields(self):
            value, may_be_zero = getattr(self, field.name), field.name.endswith("_us") or field.name == "reserved_gib"
            if isinstance(value, int | float) and not (0 <= value < math.inf and (value > 0 or may_be_zero)):
                raise ValueError(f"{field.name} = {value} must be {'at least' if may_be_zero else 'greater than'} 0")
        for name in SHARES:
            shares = getattr(self, name)
            if not shares:
                raise ValueError(f"{name} = {{}} holds nothing; give at least one number of rows and its share")
            for rows, share in shares.items():
                if not 0 < share <= 1 or rows < 1:
                    raise ValueError(f"{name} = {rows}: {share} must be rows of at least 1 and a share between 0 and 1")
        if self.attention_share > 1:
            raise ValueError(f"attention_share = {self.attention_share} must be at most 1")

    @property
    def precision(self) -> str:
        """What a run here takes whose JSON says "auto", as far as these figures tell: `bf16` or `fp32`."""
        return BF16 if self.bf16_tflops >= MIN_SPEEDUP * self.fp32_tflops else FP32

    def flops(self, bf16: bool) -> float:
        """Peak FLOP/s of products."""
        return 1e12 * (self.bf16_tflops if bf16 else self.fp32_tflops)

    def seconds(self, sent: Sent) -> float:
        """To send this much, first the one way, then the other."""
        return sent.in_node / (1e9 * self.in_node_gb_s) + sent.between_nodes / (1e9 * self.between_nodes_gb_s)

    def latency(self, ranks_in_node: int, nodes: int) -> float:
        """Seconds of an empty collective: a message to each level of a tree, inside nodes and between them."""
        return 1e-6 * (
            self.in_node_us * math.ceil(math.log2(ranks_in_node)) + self.between_nodes_us * math.ceil(math.log2(nodes))
        )

    @property
    def usable(self) -> float:
        """Bytes that a plan may fill."""
        return GIB * (self.memory_gib - self.reserved_gib)


def read_machine(name: str, presets: Path) -> Machine:
    """A preset by name, or a machine of one's own from a YAML file with the fields of `Machine`.

    Raises:
        ValueError: unknown name (with the nearest), file that cannot be read, or a field that is missing, unknown or wrong.
    """
    if name.endswith((".yaml", ".yml")):
        return _machine(read_yaml(Path(name), f"--machine {name}"), name)
    known = read_yaml(presets, f"--machine {presets.name}")
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"--machine {name}: unknown; {hint}known: {', '.join(known)}; a YAML file's path also works")
    return _machine(known[name], name)


def _machine(values: dict[str, Any], name: str) -> Machine:
    hints = typing.get_type_hints(Machine)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            raise ValueError(f"--machine {name}: unknown key {key}; {f'did you mean {close[0]}?' if close else 'remove it'}")
    for key, hint in hints.items():
        if key not in values:
            raise ValueError(f"--machine {name}: {key} is missing; see tools/machines.yaml")
        kinds, expected = KINDS[hint]
        if not isinstance(values[key], kinds) or isinstance(values[key], bool):
            raise ValueError(f"--machine {name}: {key} = {values[key]!r} is {type_name(values[key])}; expected {expected}")
    for key in SHARES:
        for rows, share in values[key].items():
            if not isinstance(rows, int) or not isinstance(share, int | float):
                raise ValueError(f"--machine {name}: {key} = {rows!r}: {share!r}; expected a number of rows and a share")
    try:
        return Machine(**values)
    except ValueError as error:
        raise ValueError(f"--machine {name}: {error}") from None
