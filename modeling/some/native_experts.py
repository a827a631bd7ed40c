"""How the compiled kernels of the experts are called: they begin with rows, sizes and weights, then take what each needs.

Shapes: T tokens, K experts a token, N = T * K rows, of which the first R are of this shard, D width, F expert hidden width,
e experts of the shard.
"""

import ctypes

import torch

from modeling.some.rows import RoutedRows
from modeling.some.weights import ExpertWeights


class _Rows(ctypes.Structure):
    """`Rows` of kernels/tasks.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("tokens", "row_of", "of_expert")] + [
        (name, ctypes.c_int64) for name in ("experts", "R", "T", "K")
    ]


def call_experts(
    library: ctypes.CDLL, function: str, rows: RoutedRows, weights: ExpertWeights, *others: torch.Tensor | bool | None
) -> None:
    """Call with rows, sizes and weights, which all functions begin with, then the others; None is a null pointer."""
    rows_e = torch.tensor(rows.rows_e, dtype=torch.int64)
    indices = [tensor.data_ptr() for tensor in (rows.tokens_N, rows.row_of_TK, rows_e)]
    c_rows = _Rows(*indices, len(rows_e), sum(rows.rows_e), *rows.row_of_TK.shape)
    _, F, D = weights.w_down_eFD.shape
    tensors = [weights.w_down_eFD, weights.b_down_eF, weights.w_up_eDF, weights.b_up_eD]
    scales = [ctypes.c_float(weights.scale_down), ctypes.c_float(weights.scale_up)]
    is_int8 = weights.w_down_eFD.dtype == torch.int8
    arguments = [*map(_argument, tensors), *scales, *map(_argument, (is_int8, *others))]
    getattr(library, function)(ctypes.byref(c_rows), ctypes.c_int64(D), ctypes.c_int64(F), *arguments)


def _argument(value: torch.Tensor | bool | None) -> ctypes.c_void_p | ctypes.c_int:
    if isinstance(value, bool):
        return ctypes.c_int(value)
    assert value is None or value.is_contiguous()
    return ctypes.c_void_p(None if value is None else value.data_ptr())
