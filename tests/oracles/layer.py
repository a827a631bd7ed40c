"""One SoME layer, token by token and slot by slot (some.md section 2), in plain differentiable torch.

It computes in the dtype of `x_TD`; pass float64 for a reference. Gradients reach x_TD and the query weights only
through what the spec lets them: the choice of experts is not differentiated, the gates and the experts' inputs are.

Shape suffixes: T tokens, K slots (top-k), E experts, D model width, F expert hidden width.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Linear = tuple[Tensor, Tensor]  # weight (out, in) and bias (out)
Expert = tuple[Tensor, Tensor, Tensor, Tensor]  # w_down_FD, b_down_F, w_up_DF, b_up_D


def some_layer_per_token(
    x_TD: Tensor,
    query_weights: Sequence[Linear] | Mapping[str, Linear],
    keys_ED: Tensor,
    experts: Callable[[int], Expert],
    top_k: int,
    temperature: float = 1.0,
    *,
    normalise_query: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y_TD without the residual (the block adds it), expert_ids_TK and gates_TK.

    `query_weights`: one (weight, bias) is a linear router, two are an MLP with exact GELU between; a mapping is read in
    its order. Equal scores go to the lower expert id. `normalise_query`: False in v1.1, whose scores are raw products.
    """
    linears = list(query_weights.values()) if isinstance(query_weights, Mapping) else list(query_weights)
    keys_ED = keys_ED.detach().to(x_TD.dtype)
    outputs, ids_TK, gates = [], [], []
    for x_D in x_TD:
        q_D = unit_query(x_D, linears) if normalise_query else raw_query(x_D, linears)
        scores = [torch.dot(q_D, key_D) for key_D in keys_ED]
        chosen = [e for _, e in sorted((-score.item(), e) for e, score in enumerate(scores))][:top_k]

        exponentials = [torch.exp((scores[e] - scores[chosen[0]]) / temperature) for e in chosen]
        total = torch.stack(exponentials).sum()
        gates_K = [exponential / total for exponential in exponentials]

        y_D = torch.zeros_like(x_D)
        for gate, e in zip(gates_K, chosen, strict=True):
            y_D = y_D + gate * expert_output(x_D, experts(e))
        outputs.append(y_D)
        ids_TK.append(chosen)
        gates.append(torch.stack(gates_K))
    return torch.stack(outputs), torch.tensor(ids_TK), torch.stack(gates)


def unit_query(x_D: Tensor, linears: Sequence[Linear]) -> Tensor:
    """q = Q(x) / max(||Q(x)||, 1e-12)."""
    h = raw_query(x_D, linears)
    return h / torch.linalg.vector_norm(h).clamp_min(1e-12)


def raw_query(x_D: Tensor, linears: Sequence[Linear]) -> Tensor:
    """Q(x)."""
    h = x_D
    for i, (weight, bias) in enumerate(linears):
        if i > 0:
            h = gelu_erf(h)
        h = weight.to(h.dtype) @ h + bias.to(h.dtype)
    return h


def expert_output(x_D: Tensor, expert: Expert) -> Tensor:
    """W_up gelu(W_down x + b_down) + b_up; the expert's own weights are frozen."""
    w_down_FD, b_down_F, w_up_DF, b_up_D = (tensor.detach().to(x_D.dtype) for tensor in expert)
    return w_up_DF @ gelu_erf(w_down_FD @ x_D + b_down_F) + b_up_D


def gelu_erf(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
