"""Pools of experts and tokens for them, and what every kernel must do with these.

Shapes: T tokens, D width, F expert hidden width, E experts, K experts a token.
"""

import pytest
import torch

from modeling.some import FrozenExpertPool, SoMEConfig
from modeling.some.experts_amx import why_not_amx
from modeling.some.experts_simd import why_not_simd

WIDE = SoMEConfig(d_model=64, num_experts=6, d_ffn=96, top_k=2)  # what the fused kernels take: multiples of 32 and of 16


def make_pool(kernel: str, dtype: torch.dtype, config: SoMEConfig = WIDE, biases: bool = True) -> FrozenExpertPool:
    """A pool that computes with this kernel, with biases unless told otherwise."""
    why_not = {"amx": why_not_amx, "simd": why_not_simd}.get(kernel, lambda: None)()
    if why_not:
        pytest.skip(f"the fused kernel cannot run here: {why_not}")
    pool = FrozenExpertPool(config, dtype=dtype)
    pool.kernel = kernel
    generator = torch.Generator().manual_seed(0)
    for bias in (pool.b_down_eF, pool.b_up_eD) if biases else ():
        bias.normal_(generator=generator)
    return pool


def make_slots(tokens: int, experts: int, top_k: int, elsewhere: float, generator: torch.Generator) -> torch.Tensor:
    """Distinct experts for each token, unevenly popular, some of them in other shards."""
    popularity = torch.rand(tokens, experts, generator=generator) + torch.linspace(0, 1.5, experts)
    slots_TK = popularity.topk(top_k).indices
    slots_TK[torch.rand(slots_TK.shape, generator=generator) < elsewhere] = -1
    return slots_TK


def check_against_float64(
    pool: FrozenExpertPool, x_dtype: torch.dtype, tolerance: float, tokens: int, top_k: int, elsewhere: float
) -> None:
    """Outputs and gradients are those of the reference in float64, and of the dtype of the inputs."""
    exact = FrozenExpertPool(pool.config, dtype=torch.float64)
    for ours, its in zip(pool.buffers(), exact.buffers(), strict=True):
        its.copy_(ours)
    E, D, generator = pool.config.num_experts, pool.config.d_model, torch.Generator().manual_seed(tokens)
    slots_TK = make_slots(tokens, E, top_k, elsewhere, generator)
    x_TD, weight_TD = (torch.randn(tokens, D, generator=generator).to(x_dtype) for _ in range(2))
    gates_TK = torch.rand(tokens, top_k, generator=generator)
    results = []
    for compute, precision in ((pool.forward, x_dtype), (exact.reference, torch.float64)):
        x, gates = x_TD.to(precision, copy=True).requires_grad_(), gates_TK.clone().requires_grad_()
        y_TD = compute(x, gates, slots_TK)
        (y_TD * weight_TD).sum().backward()
        results.append((y_TD.detach(), x.grad, gates.grad))
    for ours, reference, kind in zip(*results, (x_dtype, x_dtype, torch.float32), strict=True):
        assert ours.dtype == kind
        assert (ours - reference).norm() <= tolerance * reference.norm()
    assert (slots_TK == -1).all(dim=1).logical_not().equal(results[0][0].any(dim=1)), (
        "a token without experts here gets zero"
    )


def check_threads(pool: FrozenExpertPool, x_dtype: torch.dtype) -> None:
    """Outputs and gradients are the same bits whatever the number of threads."""
    E, D, generator = pool.config.num_experts, pool.config.d_model, torch.Generator().manual_seed(0)
    slots_TK = make_slots(900, E, 4, 0.1, generator)
    x_TD, gates_TK = torch.randn(900, D, generator=generator).to(x_dtype), torch.rand(900, 4, generator=generator)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            x, gates = x_TD.clone().requires_grad_(), gates_TK.clone().requires_grad_()
            y_TD = pool(x, gates, slots_TK)
            y_TD.square().sum().backward()
            results.append((y_TD.detach(), x.grad, gates.grad))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
