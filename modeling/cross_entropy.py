"""Cross entropy of every position in fp32, without an fp32 copy of all logits.

Shapes: N positions, V vocabulary, n positions of one slice.
"""

import torch
import torch.nn.functional as F

NO_TARGET = -100
# Positions at a time: on CPUs what is in fp32 stays in the cache, on GPUs there are few launches.
SLICE, CUDA_SLICE = 128, 4096


def cross_entropy(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """(N,) fp32 losses in nats; 0 where the target is -100.

    Args:
        logits_NV: any floating dtype; computed with in fp32.
        targets_N: int64 classes, or -100.
    """
    return _CrossEntropy.apply(logits_NV, targets_N)


def reference(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """What `cross_entropy` computes, as torch has it."""
    return F.cross_entropy(logits_NV.float(), targets_N, ignore_index=NO_TARGET, reduction="none")


class _CrossEntropy(torch.autograd.Function):
    """The forward keeps the gradient, softmax minus one-hot, in the dtype of the logits: exponentials are taken once."""

    @staticmethod
    def forward(ctx, logits_NV, targets_N):
        losses_N = torch.empty(len(targets_N), dtype=torch.float32, device=logits_NV.device)
        grad_NV = torch.empty_like(logits_NV) if ctx.needs_input_grad[0] else None
        for rows in _slices(targets_N):
            logits_nV, targets_n = logits_NV[rows].to(torch.float32, copy=True), targets_N[rows]
            counts_n = targets_n != NO_TARGET
            classes_n1 = targets_n.where(counts_n, 0)[:, None]
            normaliser_n = logits_nV.logsumexp(-1)
            losses_N[rows] = (normaliser_n - logits_nV.gather(1, classes_n1)[:, 0]) * counts_n
            if grad_NV is not None:
                softmax_nV = logits_nV.sub_(normaliser_n[:, None]).exp_()
                softmax_nV.scatter_add_(1, classes_n1, softmax_nV.new_full(classes_n1.shape, -1.0))
                grad_NV[rows] = softmax_nV
        ctx.save_for_backward(grad_NV, targets_N)
        return losses_N

    @staticmethod
    def backward(ctx, grad_losses_N):
        grad_NV, targets_N = ctx.saved_tensors
        scale_N = grad_losses_N * (targets_N != NO_TARGET)
        grad_logits_NV = torch.empty_like(grad_NV)
        for rows in _slices(targets_N):
            # Multiplied in fp32: rounded to bf16, 1 / targets would be off by up to 0.4 % for all rows alike.
            grad_logits_NV[rows] = grad_NV[rows] * scale_N[rows, None]
        return grad_logits_NV, None


def _slices(targets_N: torch.Tensor) -> list[slice]:
    size = CUDA_SLICE if targets_N.is_cuda else SLICE
    return [slice(start, start + size) for start in range(0, len(targets_N), size)]
