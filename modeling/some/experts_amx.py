"""Frozen experts in one fused kernel, for CPUs with AMX: the Python side of kernels/experts_amx.cpp.

Shapes: T tokens, K experts a token, N = T * K rows, of which the first R are of this shard, D width, F expert hidden width,
e experts of the shard.
"""

import ctypes
import functools
from pathlib import Path

import torch

from modeling.some.native import Unavailable, load_library
from modeling.some.native_experts import call_experts
from modeling.some.rows import RoutedRows
from modeling.some.weights import ExpertWeights

SOURCE = "experts_amx.cpp"
FLAGS = [f"-m{feature}" for feature in "avx512f avx512bw avx512vl avx512dq avx512bf16 fma amx-tile amx-bf16".split()]
NEEDED = {"amx_tile", "amx_bf16", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"}  # as Linux names them
MULTIPLE = 32  # of D and F: values in a row of a tile


@functools.cache
def why_not_amx(kept: torch.dtype = torch.bfloat16) -> str | None:
    """Why this machine cannot use the kernel on matrices that are kept in this dtype; None if it can."""
    if kept not in (torch.bfloat16, torch.int8):
        return f"the fused kernel does not read {kept}"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii").partition("\nflags")[2].partition("\n")[0].split()
    except OSError:
        flags = []
    missing = sorted(NEEDED.difference(flags))
    if missing:
        return f"the processor has no {', '.join(missing)}"
    try:
        allowed = _library().experts_allowed()
    except Unavailable as reason:
        return str(reason)
    return None if allowed else "the system does not let programs use AMX"


def _library() -> ctypes.CDLL:
    return load_library(SOURCE, *FLAGS)


def can_use_amx(weights: ExpertWeights) -> bool:
    """Whether weights of this dtype, size and device can be computed with here."""
    fits = all(size % MULTIPLE == 0 for size in weights.w_down_eFD.shape[1:])
    on_cpu = weights.w_down_eFD.device.type == "cpu"
    return on_cpu and weights.dtype == torch.bfloat16 and fits and why_not_amx(weights.w_down_eFD.dtype) is None


def amx_experts(x_TD: torch.Tensor, gates_TK: torch.Tensor, rows: RoutedRows, weights: ExpertWeights) -> torch.Tensor:
    """(T, D) gate-weighted sums in the dtype of `x_TD`.

    Each expert's gated output is rounded to bf16, and a token's are summed in fp32 in the order of its experts.
    """
    return _AmxExperts.apply(x_TD, gates_TK, rows, weights)


class _AmxExperts(torch.autograd.Function):
    """The backward needs the pre-activations h and nothing else per row."""

    @staticmethod
    def forward(ctx, x_TD, gates_TK, rows, weights):
        x_in_TD, gates_N = x_TD.to(torch.bfloat16).contiguous(), rows.sort(gates_TK).float()
        keep = any(ctx.needs_input_grad)
        h_RF = x_in_TD.new_empty(sum(rows.rows_e), weights.w_down_eFD.shape[1]) if keep else None
        y_TD = torch.empty(x_TD.shape, dtype=_result_dtype(x_TD.dtype))
        call_experts(_library(), "experts_forward", rows, weights, x_in_TD, gates_N, h_RF, y_TD, y_TD.dtype == torch.float32)
        ctx.save_for_backward(gates_N, h_RF)
        ctx.rows, ctx.weights, ctx.x_dtype = rows, weights, x_TD.dtype
        return y_TD.to(x_TD.dtype)

    @staticmethod
    def backward(ctx, grad_y_TD):
        gates_N, h_RF = ctx.saved_tensors
        grad_in_TD = grad_y_TD.to(torch.bfloat16).contiguous()
        grad_x_TD = torch.empty(grad_y_TD.shape, dtype=_result_dtype(ctx.x_dtype))
        grad_gates_N = torch.zeros_like(gates_N)
        is_fp32 = grad_x_TD.dtype == torch.float32
        others = (grad_in_TD, gates_N, h_RF, grad_x_TD, is_fp32, grad_gates_N)
        call_experts(_library(), "experts_backward", ctx.rows, ctx.weights, *others)
        return grad_x_TD.to(ctx.x_dtype), ctx.rows.unsort(grad_gates_N), None, None


def _result_dtype(wanted: torch.dtype) -> torch.dtype:
    """What the kernel writes for a wanted dtype: bf16, or fp32 for all others."""
    return torch.bfloat16 if wanted == torch.bfloat16 else torch.float32
