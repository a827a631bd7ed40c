"""What follows attention in a block, token by token, in the dtype of `x_TD` (some.md 1.1 with the controls of F3 and F11).

A dense FFN is W2 gelu(W1 x + b1) + b2, as is a frozen one; a readout is a linear layer of the mixer's output, which is
normalised first (mean 0, variance 1, no parameters); without a mixer it reads gelu of the input.

Shape suffixes: T tokens, D model width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.oracles.layer import Expert, Linear, expert_output, gelu_erf
from tests.oracles.transformer import layer_norm


def mix_per_token(
    x_TD: Tensor,
    kind: str,
    *,
    some: Callable[[Tensor], Tensor] | None = None,
    ffn: Expert | None = None,
    input_map: Linear | None = None,
    readout: Linear | None = None,
) -> Tensor:
    """What is added to the residual stream.

    `kind`: "some" (`some` computes x_TD -> y_TD), "dense" or "frozen_dense" (`ffn` has its weights; gradients stop there in
    a frozen one and flow into those of a dense one), or "none".
    """
    if input_map is not None:
        weight_DD, bias_D = input_map
        x_TD = torch.stack([x_D + (weight_DD @ x_D + bias_D) for x_D in x_TD])
    if kind == "some":
        y_TD = some(x_TD)
    elif kind == "frozen_dense":
        y_TD = torch.stack([expert_output(x_D, ffn) for x_D in x_TD])
    elif kind == "dense":
        w_down_FD, b_down_F, w_up_DF, b_up_D = ffn
        y_TD = torch.stack([w_up_DF @ gelu_erf(w_down_FD @ x_D + b_down_F) + b_up_D for x_D in x_TD])
    elif kind == "none":
        y_TD = torch.zeros_like(x_TD) if readout is None else gelu_erf(x_TD)
    else:
        raise ValueError(kind)
    if readout is None:
        return y_TD
    weight_DD, bias_D = readout
    return torch.stack([weight_DD @ row_D + bias_D for row_D in layer_norm(y_TD, eps=1e-8)])
