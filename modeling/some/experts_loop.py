"""Frozen experts by torch's own matrix products, one expert after the other: on any device and in any dtype.

Shapes: T tokens, K experts a token, N = T * K rows, B rows in blocks, D width, F expert hidden width, e experts of the
shard.
Within the loop: b rows of one block, r <= b rows that are real.
"""

import torch
import torch.nn.functional as F

from modeling.some.rows import RoutedRows
from modeling.some.weights import ExpertWeights


def loop_experts(
    x_TD: torch.Tensor,
    gates_TK: torch.Tensor,
    rows: RoutedRows,
    weights: ExpertWeights,
) -> torch.Tensor:
    """(T, D) gate-weighted sums in the dtype of `x_TD`; computed in that of the weights, summed in fp32."""
    return _FrozenExperts.apply(x_TD, gates_TK, rows, weights)


class _FrozenExperts(torch.autograd.Function):
    """Experts without weight gradients: the backward needs the pre-activations h and nothing else per row.

    Each expert's rows are computed as one block (see `_blocks`); rows beyond its own are zeros and are left out of every
    sum.
    """

    @staticmethod
    def forward(ctx, x_TD, gates_TK, rows, weights):
        x_in_TD, gates_N = x_TD.to(weights.dtype), rows.sort(gates_TK)
        blocks = _blocks(rows.rows_e, x_in_TD)
        # Sums over experts in fp32: bf16 would round once per expert.
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        keep = any(ctx.needs_input_grad)
        h_BF = x_in_TD.new_empty(blocks[-1][2].stop if keep and blocks else 0, weights.w_down_eFD.shape[1])
        for slot, segment, block in blocks:
            tokens_r = rows.tokens_N[segment]
            x_bD = _gather(x_in_TD, tokens_r, block)
            out = h_BF[block] if keep else None
            w_down_FD, w_up_DF = weights.matrices(slot)
            h_bF = torch.addmm(weights.b_down_eF[slot], x_bD, w_down_FD.T, out=out)
            y_bD = torch.addmm(weights.b_up_eD[slot], F.gelu(h_bF), w_up_DF.T)
            y_TD.index_add_(0, tokens_r, y_bD[: len(tokens_r)].float().mul_(gates_N[segment, None]))
        ctx.save_for_backward(gates_N, h_BF)
        ctx.rows, ctx.weights, ctx.blocks, ctx.x_dtype = rows, weights, blocks, x_TD.dtype
        return y_TD.to(x_TD.dtype)

    @staticmethod
    def backward(ctx, grad_y_TD):
        gates_N, h_BF = ctx.saved_tensors
        grad_in_TD = grad_y_TD.to(h_BF.dtype)
        grad_x_TD = torch.zeros(grad_y_TD.shape, dtype=torch.float32, device=grad_y_TD.device)
        grad_gates_N = torch.zeros_like(gates_N)
        for slot, segment, block in ctx.blocks:
            tokens_r, h_bF = ctx.rows.tokens_N[segment], h_BF[block]
            r = len(tokens_r)
            grad_y_bD = _gather(grad_in_TD, tokens_r, block)
            # The ungated gradient of the activation serves twice: times the activation it is dL/dgate, so y is not kept.
            w_down_FD, w_up_DF = ctx.weights.matrices(slot)
            grad_a_bF = grad_y_bD @ w_up_DF
            grad_bias_r = grad_y_bD[:r].float() @ ctx.weights.b_up_eD[slot].float()
            grad_gates_N[segment] = (grad_a_bF[:r].float() * F.gelu(h_bF[:r]).float()).sum(-1) + grad_bias_r
            grad_a_bF[:r] *= gates_N[segment, None].to(grad_a_bF.dtype)
            grad_h_bF = torch.ops.aten.gelu_backward(grad_a_bF, h_bF)
            grad_x_TD.index_add_(0, tokens_r, (grad_h_bF @ w_down_FD)[:r].float())
        return grad_x_TD.to(ctx.x_dtype), ctx.rows.unsort(grad_gates_N), None, None


def _gather(source_TD: torch.Tensor, tokens_r: torch.Tensor, block: slice) -> torch.Tensor:
    """(b, D): the rows of `tokens_r`, then zeros."""
    rows_bD = source_TD.new_zeros(block.stop - block.start, source_TD.shape[1])
    torch.index_select(source_TD, 0, tokens_r, out=rows_bD[: len(tokens_r)])
    return rows_bD


def _blocks(rows_e: list[int], like: torch.Tensor) -> list[tuple[int, slice, slice]]:
    """`(slot, its rows, its rows in the block layout)` for every expert that has any."""
    blocks, first, start = [], 0, 0
    for slot, rows in enumerate(rows_e):
        size = _block_size(rows, like)
        if size:
            blocks.append((slot, slice(first, first + rows), slice(start, start + size)))
        first, start = first + rows, start + size
    return blocks


def _block_size(rows: int, like: torch.Tensor) -> int:
    """Rows that are computed for `rows` that are wanted.

    bf16 on CPUs goes through oneDNN, which compiles a kernel for every new number of rows (2-7 ms, ten times the product
    itself) and forgets old ones beyond 1,024: with eight sizes an octave, at least 32 rows apart, a run has all its kernels
    after a few steps, for at most an eighth more rows (and 32).
    """
    if like.device.type != "cpu" or like.dtype != torch.bfloat16:
        return rows
    multiple = max(32, 1 << (rows.bit_length() - 4) if rows > 8 else 1)
    return -(-rows // multiple) * multiple
