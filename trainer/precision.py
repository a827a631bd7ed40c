"""In which precision a run computes: bf16 or fp32.

A DeepSpeed JSON may leave the choice to us (`"bf16": {"enabled": "auto"}`). Then it is made once, when the run first starts,
by what the machine of rank 0 is good at, and recorded in `config.yaml` and in every checkpoint. Whatever machine the run
resumes on, it keeps it: precision is the only thing about a machine that may change a curve.
"""

import statistics
import time
from dataclasses import dataclass

from modeling.config import ModelConfig

AUTO, BF16, FP32 = "auto", "bf16", "fp32"
MIN_SPEEDUP = 1.5
"""bf16 is chosen on a CPU where its products are at least this many times as fast as fp32 ones."""
MIN_CAPABILITY = (8, 0)
"""Compute capability of the first GPUs with bf16 products."""
PROBES = 5
"""Products that are timed in each precision."""
MAX_PROBE_WIDTH = 1024
"""A probe's matrix has the sides of an expert's, up to this size."""
MIN_PROBE_ROWS, PROBE_SIZE = 64, 2**25
"""Its input has as many rows as make this many multiplications: about a millisecond, and 50 where bf16 is emulated."""


@dataclass(frozen=True)
class Precision:
    """`bf16` or `fp32`, and why in words."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"

    @staticmethod
    def parse(text: str) -> "Precision":
        """The reverse of `str`."""
        name, _, reason = text.partition(": ")
        return Precision(name, reason)


def choose_precision(asked: str, path: str, began: str | None, model: ModelConfig, local_rank: int) -> Precision:
    """The precision of a run.

    Args:
        asked: `auto`, `bf16` or `fp32`, as the DeepSpeed JSON says.
        path: of the JSON, for the reason.
        began: the precision in which the run began earlier; None for a new one.
        model: its sizes decide the probe's.
        local_rank: which GPU of this machine to look at, where there is any.
    """
    hidden = model.some.d_ffn if model.channel_mixer == "some" else model.d_ffn or model.d_model
    if asked == AUTO and began is None:
        return best_precision(model.d_model, hidden, local_rank)
    if asked == AUTO:
        kept = Precision(began, "as the run began")
    else:
        kept = Precision(asked, f"bf16.enabled = {'true' if asked == BF16 else 'false'} in {path}")
    if kept.name == FP32:
        return kept
    here = best_precision(model.d_model, hidden, local_rank)
    return kept if here.name == BF16 else Precision(BF16, f"{kept.reason}; slow here: {here.reason}")


def best_precision(width: int, hidden: int, local_rank: int) -> Precision:
    """What suits this machine: bf16 on GPUs that have it, and on CPUs where products of matrices (width, hidden) are faster
    so."""
    import torch  # takes seconds, which `--help` and refusals need not wait

    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(min(local_rank, torch.cuda.device_count() - 1))
        found = f"the GPU has compute capability {'.'.join(map(str, capability))}"
        if capability >= MIN_CAPABILITY:
            return Precision(BF16, found)
        return Precision(FP32, f"{found}, and bf16 needs {'.'.join(map(str, MIN_CAPABILITY))}")
    ratio = bf16_speedup(width, hidden)
    if ratio >= MIN_SPEEDUP:
        return Precision(BF16, f"its products are {ratio:.1f}x as fast as those of fp32 on this CPU")
    if ratio < 1:
        return Precision(FP32, f"products of bf16 take {1 / ratio:.1f}x as long on this CPU")
    return Precision(FP32, f"products of bf16 are only {ratio:.1f}x as fast on this CPU, and {MIN_SPEEDUP}x is needed")


def bf16_speedup(width: int, hidden: int) -> float:
    """How many times as fast a product is in bf16 as in fp32, on one thread of this CPU.

    The ratio of two medians over products that take turns, so that a busy moment decides nothing.
    """
    import torch

    D, H = min(width, MAX_PROBE_WIDTH), min(hidden, MAX_PROBE_WIDTH)
    x_TD, w_DH = torch.ones(max(MIN_PROBE_ROWS, PROBE_SIZE // (D * H)), D), torch.ones(D, H)
    pairs = {dtype: (x_TD.to(dtype), w_DH.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in pairs}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that ranks which probe side by side do not wait for each other
    try:
        for turn in range(PROBES + 1):
            for dtype, (x, w) in pairs.items():
                began = time.perf_counter()
                x @ w
                if turn:  # the first product of a kind compiles its kernel
                    seconds[dtype].append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(seconds[torch.float32]) / statistics.median(seconds[torch.bfloat16])
