"""Routing: query network, cosine scores against the key store, top-k, gates. Everything after the network is fp32.

Shapes: T tokens, D width, E experts, K experts a token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from modeling.config import SoMEConfig


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How one SoME layer routed one batch of real tokens; leaves the model as a value, detached from the graph.

    `queries_TD` fp32 unit queries, `expert_ids_TK` int64 in descending order of score, `gates_TK` fp32,
    `output_square_sum` and `residual_square_sum` fp32 scalars: sums of squares over (T, D) of what the experts add and of
    the residual stream that they add it to.
    """

    queries_TD: torch.Tensor
    expert_ids_TK: torch.Tensor
    gates_TK: torch.Tensor
    output_square_sum: torch.Tensor
    residual_square_sum: torch.Tensor


class QueryNetwork(nn.Sequential):
    """Maps a token to its unit query. Initialised like torch's own linear layers."""

    def __init__(self, config: SoMEConfig):
        D, H = config.d_model, config.router_hidden
        linear = [nn.Linear(D, D)]
        mlp = [nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)]
        super().__init__(*(linear if config.router == "linear" else mlp))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) any floating dtype to fp32 rows of norm 1."""
        return F.normalize(super().forward(x).float(), dim=-1, eps=1e-12)


def route(
    queries_TD: torch.Tensor, keys_ED: torch.Tensor, top_k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(gates_TK fp32, expert_ids_TK int64)`: the K best keys by dot product in descending order, and the softmax of their
    scores divided by `temperature`. Gradients reach the queries through the gates only (specs section 2).
    """
    with torch.autocast(queries_TD.device.type, enabled=False):
        scores_TE = queries_TD @ keys_ED.T
        scores_TK, expert_ids_TK = scores_TE.topk(top_k, dim=-1)
        return torch.softmax(scores_TK / temperature, dim=-1), expert_ids_TK
