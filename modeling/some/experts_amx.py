"""Frozen experts in one fused kernel, for CPUs with AMX: the Python side of kernels/experts_amx.cpp.

Shapes: T tokens, K experts a token, R routed rows, D width, F expert hidden width, e experts of the shard.
"""

import ctypes
import functools

import torch

from modeling.some.native import Unavailable, load_library
from modeling.some.rows import RoutedRows

SOURCE = "experts_amx.cpp"
FLAGS = [f"-m{feature}" for feature in "avx512f avx512bw avx512vl avx512dq avx512bf16 fma amx-tile amx-bf16".split()]
MULTIPLE = 32  # of D and F: values in a row of a tile


@functools.cache
def why_not_amx() -> str | None:
    """Why this machine cannot use the kernel; None if it can."""
    try:
        supported = load_library(SOURCE, *FLAGS).experts_supported()
    except Unavailable as reason:
        return str(reason)
    return None if supported else "the processor has no AMX for bf16, or the system does not let programs use it"


def can_use_amx(weights: torch.Tensor) -> bool:
    """Whether weights (e, F, D) of this dtype, size and device can be computed with here."""
    fits = weights.shape[1] % MULTIPLE == 0 and weights.shape[2] % MULTIPLE == 0
    return weights.device.type == "cpu" and weights.dtype == torch.bfloat16 and fits and why_not_amx() is None


def amx_experts(
    x_TD: torch.Tensor,
    gates_TK: torch.Tensor,
    rows: RoutedRows,
    w_down_eFD: torch.Tensor,
    b_down_eF: torch.Tensor,
    w_up_eDF: torch.Tensor,
    b_up_eD: torch.Tensor,
) -> torch.Tensor:
    """(T, D) gate-weighted sums in the dtype of `x_TD`, fp32 or bf16.

    Each expert's gated output is rounded to bf16, and a token's are summed in fp32 in the order of its experts.
    """
    return _AmxExperts.apply(x_TD, gates_TK, rows, w_down_eFD, b_down_eF, w_up_eDF, b_up_eD)


class _AmxExperts(torch.autograd.Function):
    """The backward needs the pre-activations h and nothing else per row."""

    @staticmethod
    def forward(ctx, x_TD, gates_TK, rows, w_down_eFD, b_down_eF, w_up_eDF, b_up_eD):
        x_in_TD, gates_R = x_TD.to(torch.bfloat16).contiguous(), rows.sort(gates_TK).float()
        keep = any(ctx.needs_input_grad)
        h_RF = x_in_TD.new_empty(len(gates_R), w_down_eFD.shape[1]) if keep else None
        y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
        _call(
            "experts_forward",
            rows,
            [x_in_TD, gates_R],
            [w_down_eFD, b_down_eF, w_up_eDF, b_up_eD, h_RF, y_TD, y_TD.dtype == torch.float32],
        )
        ctx.save_for_backward(gates_R, h_RF, w_down_eFD, w_up_eDF, b_up_eD)
        ctx.rows, ctx.x_dtype = rows, x_TD.dtype
        return y_TD

    @staticmethod
    def backward(ctx, grad_y_TD):
        gates_R, h_RF, w_down_eFD, w_up_eDF, b_up_eD = ctx.saved_tensors
        grad_x_TD = torch.empty(grad_y_TD.shape, dtype=ctx.x_dtype)
        grad_gates_R = torch.empty_like(gates_R)
        _call(
            "experts_backward",
            ctx.rows,
            [grad_y_TD.to(torch.bfloat16).contiguous(), gates_R],
            [w_down_eFD, w_up_eDF, b_up_eD, h_RF, grad_x_TD, grad_x_TD.dtype == torch.float32, grad_gates_R],
        )
        return grad_x_TD, ctx.rows.unsort(grad_gates_R), *[None] * 5


def _call(function: str, rows: RoutedRows, inputs: list[torch.Tensor], others: list[torch.Tensor | bool | None]) -> None:
    """Call with what both functions begin with (inputs, rows, sizes), then the others; None becomes a null pointer."""
    T, D = inputs[0].shape
    K, F, R, e = rows.row_of_TK.shape[1], others[0].shape[1], len(rows.tokens_R), len(rows.rows_e)
    indices = [rows.tokens_R, rows.row_of_TK, torch.tensor(rows.rows_e, dtype=torch.int64)]
    sizes = [ctypes.c_int64(size) for size in (e, R, T, K, D, F)]
    call = getattr(load_library(SOURCE, *FLAGS), function)
    call(*map(_argument, [*inputs, *indices]), *sizes, *map(_argument, others))


def _argument(value: torch.Tensor | bool | None) -> ctypes.c_void_p | ctypes.c_int:
    if isinstance(value, bool):
        return ctypes.c_int(value)
    assert value is None or value.is_contiguous()
    return ctypes.c_void_p(None if value is None else value.data_ptr())
