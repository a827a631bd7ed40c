"""Learning-rate schedule and one clipped AdamW step, as textbook formulas (some.md 1.4; the warm-up: cure of flaw F8).

No shape suffixes: `adamw_element` takes one number, or a float64 tensor of any shape, element by element.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, min_ratio: float = 0.0) -> float:
    """Rate of step 0, 1, ..., total_steps - 1: linear warm-up, then a cosine down to min_ratio * peak.

    peak 1, warm-up 4, total 8, floor 0.1: 0.25, 0.5, 0.75, 1, 1, 0.868, 0.55, 0.232 (and 0.1 when it is over).
    A cosine of a single step (total_steps = warmup_steps + 1) is at peak.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if total_steps <= warmup_steps:
        return peak
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return peak * (min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2)


def clip_by_global_norm(grads: list[Tensor], max_norm: float, eps: float = 1e-6) -> tuple[list[Tensor], float]:
    """Gradients scaled so that the norm of all of them together is at most max_norm, and that norm before."""
    grads = [grad.detach().to(torch.float64) for grad in grads]
    norm = math.sqrt(math.fsum(float((grad**2).sum()) for grad in grads))
    scale = min(1.0, max_norm / (norm + eps))
    return [grad * scale for grad in grads], norm


def adamw_element(
    p: Number,
    g: Number,
    m: Number,
    v: Number,
    t: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> tuple[Number, Number, Number]:
    """New (p, m, v) of one parameter p with gradient g in optimizer step t = 1, 2, ...; m and v start at 0."""
    p = p - lr * weight_decay * p
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    m_hat = m / (1 - betas[0] ** t)
    v_hat = v / (1 - betas[1] ** t)
    return p - lr * m_hat / (v_hat**0.5 + eps), m, v


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    t: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    max_norm: float | None = 1.0,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Clip, then `adamw_element` on every tensor, in float64; returns new params, first and second moments."""
    if max_norm is not None:
        grads, _ = clip_by_global_norm(grads, max_norm)
    updated = []
    for four in zip(params, grads, first_moments, second_moments, strict=True):
        p, g, m, v = (x.detach().to(torch.float64) for x in four)
        updated.append(adamw_element(p, g, m, v, t, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
    return [p for p, _, _ in updated], [m for _, m, _ in updated], [v for _, _, v in updated]
