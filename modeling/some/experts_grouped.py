"""Frozen experts by grouped matrix products: all experts of a shard in one product, for GPUs.

Nothing here waits for the device: the rows of each expert are known to it alone. Rows of experts elsewhere come last, are
not computed and are never read.

Matrices on a grid become bf16 for the call, those of one layer at a time. Products of 8 bits (torch._scaled_grouped_mm)
would want the activations rounded to 8 bits too, and so compute something else.

Shapes: T tokens, K experts a token, N = T * K rows, of which the first R are of this shard, D width, F expert hidden width,
e experts of the shard.
"""

import torch
import torch.nn.functional as F

from modeling.some.rows import RoutedRows
from modeling.some.weights import ExpertWeights

MULTIPLE = 8  # of D and F: rows of bf16 matrices begin at multiples of 16 bytes


def can_use_grouped(weights: ExpertWeights) -> bool:
    """Whether weights of this dtype, size and device are best computed with here."""
    fits = all(size % MULTIPLE == 0 for size in weights.w_down_eFD.shape[1:])
    return weights.w_down_eFD.is_cuda and weights.dtype == torch.bfloat16 and fits


def grouped_experts(x_TD: torch.Tensor, gates_TK: torch.Tensor, rows: RoutedRows, weights: ExpertWeights) -> torch.Tensor:
    """(T, D) gate-weighted sums in the dtype of `x_TD`.

    Each expert's output is rounded to the dtype of the weights, and a token's are summed in fp32 in the order of its
    experts.
    """
    return _GroupedExperts.apply(x_TD, gates_TK, rows, weights)


class _GroupedExperts(torch.autograd.Function):
    """The backward needs the pre-activations h and nothing else per row."""

    @staticmethod
    def forward(ctx, x_TD, gates_TK, rows, weights):
        w_down_eFD, w_up_eDF = weights.matrices(slice(None))
        expert_N = _experts(rows)
        x_ND = x_TD.to(weights.dtype)[rows.tokens_N]
        h_NF = _product(x_ND, w_down_eFD.transpose(1, 2), rows).add_(weights.b_down_eF[expert_N])
        y_ND = _product(F.gelu(h_NF), w_up_eDF.transpose(1, 2), rows).add_(weights.b_up_eD[expert_N])
        ctx.save_for_backward(gates_TK, h_NF if any(ctx.needs_input_grad) else None)
        ctx.rows, ctx.weights, ctx.x_dtype = rows, weights, x_TD.dtype
        return _combine(y_ND, gates_TK, rows).to(x_TD.dtype)

    @staticmethod
    def backward(ctx, grad_y_TD):
        gates_TK, h_NF = ctx.saved_tensors
        rows, weights = ctx.rows, ctx.weights
        w_down_eFD, w_up_eDF = weights.matrices(slice(None))
        grad_y_ND = grad_y_TD.to(weights.dtype)[rows.tokens_N]
        # The ungated gradient of the activation serves twice: times the activation it is dL/dgate, so y is not kept.
        grad_a_NF = _product(grad_y_ND, w_up_eDF, rows)
        grad_gates_N = (grad_a_NF.float() * F.gelu(h_NF).float()).sum(-1)
        grad_gates_N += (grad_y_ND.float() * weights.b_up_eD[_experts(rows)].float()).sum(-1)
        grad_h_NF = torch.ops.aten.gelu_backward(grad_a_NF * rows.sort(gates_TK)[:, None].to(grad_a_NF.dtype), h_NF)
        grad_x_ND = _product(grad_h_NF, w_down_eFD, rows)
        grad_x_TD = _combine(grad_x_ND, torch.ones_like(gates_TK), rows)
        return grad_x_TD.to(ctx.x_dtype), rows.unsort(grad_gates_N), None, None


def _product(rows_NA: torch.Tensor, matrices_eAB: torch.Tensor, rows: RoutedRows) -> torch.Tensor:
    """(N, B): each row times its expert's matrix; what is there for rows of experts elsewhere is undefined."""
    return F.grouped_mm(rows_NA, matrices_eAB, offs=rows.ends_e.to(torch.int32))


def _experts(rows: RoutedRows) -> torch.Tensor:
    """(N,) place in the shard of each row's expert; any place for rows of experts elsewhere."""
    places_N = torch.arange(len(rows.pairs_N), device=rows.ends_e.device)
    return torch.searchsorted(rows.ends_e, places_N, right=True).clamp_(max=len(rows.ends_e) - 1)


def _combine(rows_ND: torch.Tensor, gates_TK: torch.Tensor, rows: RoutedRows) -> torch.Tensor:
    """(T, D) fp32: for each token the sum of its rows times their gates, always in the same order."""
    y_TD = torch.zeros(len(gates_TK), rows_ND.shape[1], dtype=torch.float32, device=rows_ND.device)
    for k in range(gates_TK.shape[1]):
        row_of_T = rows.row_of_TK[:, k]
        row_TD = rows_ND[row_of_T.clamp(min=0)].float() * gates_TK[:, k, None]
        y_TD += row_TD.masked_fill_((row_of_T < 0)[:, None], 0.0)
    return y_TD
