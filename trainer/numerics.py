"""How exactly numbers are computed."""

import os

import torch


def set_numerics(deterministic: bool) -> None:
    """Full fp32 products (no TF32: routing and key stores are fp32 by contract), and repeatable kernels if asked for.

    Operations without a repeatable kernel warn; on GPUs the backward of fused attention is one.
    """
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # Nothing here reads memory that it has not written; filling it first took a fifth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
