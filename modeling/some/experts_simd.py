"""Frozen experts in fp32 in one fused kernel, for CPUs with AVX2 or AVX-512: the Python side of kernels/experts_simd.cpp.

Shapes: T tokens, K experts a token, N = T * K rows, of which the first R are of this shard, D width, F expert hidden width,
e experts of the shard.
"""

import ctypes
import functools

import torch

from modeling.some.native import Unavailable, load_library
from modeling.some.native_experts import call_experts
from modeling.some.rows import RoutedRows
from modeling.some.weights import ExpertWeights

SOURCE = "experts_simd.cpp"
FLAGS = {"AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"), "AVX2": ("-mavx2", "-mfma")}
"""Compiler flags of the kernel's variants."""
MULTIPLE = 16  # of D and F: values of a vector of AVX-512, and of a piece of side work


def capability() -> str:
    """The vector instructions that torch uses here, of which the kernel has a variant for each of `FLAGS`.

    Those of the machine, or fewer if the environment says so: ATEN_CPU_CAPABILITY=avx2 is torch's own variable.
    """
    return torch.backends.cpu.get_cpu_capability()


def why_not_simd(kept: torch.dtype = torch.float32) -> str | None:
    """Why this machine cannot use the kernel on matrices that are kept in this dtype; None if it can."""
    if kept not in (torch.float32, torch.int8):
        return f"the fused kernel does not read {kept}"
    if capability() not in FLAGS:
        return f"torch uses neither AVX2 nor AVX-512 (but {capability()})"
    return why_not_built(capability())


@functools.cache
def why_not_built(variant: str) -> str | None:
    """Why this variant cannot be compiled or loaded; None if it can."""
    try:
        _library(variant)
    except Unavailable as reason:
        return str(reason)
    return None


def _library(variant: str) -> ctypes.CDLL:
    return load_library(SOURCE, *FLAGS[variant])


def can_use_simd(weights: ExpertWeights) -> bool:
    """Whether weights of this dtype, size and device can be computed with here."""
    fits = all(size % MULTIPLE == 0 for size in weights.w_down_eFD.shape[1:])
    on_cpu = weights.w_down_eFD.device.type == "cpu"
    return on_cpu and weights.dtype == torch.float32 and fits and why_not_simd(weights.w_down_eFD.dtype) is None


def simd_experts(x_TD: torch.Tensor, gates_TK: torch.Tensor, rows: RoutedRows, weights: ExpertWeights) -> torch.Tensor:
    """(T, D) gate-weighted sums in the dtype of `x_TD`; a token's are summed in fp32 in the order of its experts."""
    return _SimdExperts.apply(x_TD, gates_TK, rows, weights)


class _SimdExperts(torch.autograd.Function):
    """The backward needs the pre-activations h and nothing else per row."""

    @staticmethod
    def forward(ctx, x_TD, gates_TK, rows, weights):
        x_in_TD, gates_N = x_TD.float().contiguous(), rows.sort(gates_TK).float()
        keep = any(ctx.needs_input_grad)
        h_RF = x_in_TD.new_empty(sum(rows.rows_e), weights.w_down_eFD.shape[1]) if keep else None
        y_TD = torch.empty_like(x_in_TD)
        call_experts(_library(capability()), "experts_forward", rows, weights, x_in_TD, gates_N, h_RF, y_TD)
        ctx.save_for_backward(gates_N, h_RF)
        ctx.rows, ctx.weights, ctx.x_dtype = rows, weights, x_TD.dtype
        return y_TD.to(x_TD.dtype)

    @staticmethod
    def backward(ctx, grad_y_TD):
        gates_N, h_RF = ctx.saved_tensors
        grad_in_TD = grad_y_TD.float().contiguous()
        grad_x_TD, grad_gates_N = torch.empty_like(grad_in_TD), torch.zeros_like(gates_N)
        others = (grad_in_TD, gates_N, h_RF, grad_x_TD, grad_gates_N)
        call_experts(_library(capability()), "experts_backward", ctx.rows, ctx.weights, *others)
        return grad_x_TD.to(ctx.x_dtype), ctx.rows.unsort(grad_gates_N), None, None
