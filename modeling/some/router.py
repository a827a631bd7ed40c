"""Routing: query network, cosine scores against the key store, top-k, gates. Everything after the network is fp32.

Shapes: T tokens, D width, E experts, K experts a token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from modeling.config import SoMEConfig
from modeling.seeding import derive_seed
from modeling.some.respawn import token_priorities


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How one SoME layer routed one batch of real tokens; leaves the model as a value, detached from the graph.

    `queries_TD` fp32 queries (where none are asked for, the layer's input), `expert_ids_TK` int64 in descending order of
    score, `gates_TK` fp32, `output_squares_T` and `residual_squares_T` fp32: sums of squares over D of what is added to the
    residual stream and of the stream itself.
    """

    queries_TD: torch.Tensor
    expert_ids_TK: torch.Tensor
    gates_TK: torch.Tensor
    output_squares_T: torch.Tensor
    residual_squares_T: torch.Tensor


class QueryNetwork(nn.Sequential):
    """Maps a token to its query."""

    def __init__(self, config: SoMEConfig):
        D, H = config.d_model, config.router_hidden
        linear = [nn.Linear(D, D)]
        mlp = [nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)]
        super().__init__(*(linear if config.router == "linear" else mlp))
        self.normalise = config.normalise_query
        if config.router_init == "normal":
            for module in self:
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)
        self.requires_grad_(config.train_router)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) any floating dtype to fp32 rows, of norm 1 unless the config says otherwise."""
        query = super().forward(x).float()
        return _Normalise.apply(query) if self.normalise else query


class _Normalise(torch.autograd.Function):
    """Rows of norm 1, as torch.nn.functional.normalize, whose own backward passes over the rows three times as often."""

    @staticmethod
    def forward(ctx, x):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=1e-12)
        unit = x / norm
        ctx.save_for_backward(unit, norm)
        return unit

    @staticmethod
    def backward(ctx, grad):
        unit, norm = ctx.saved_tensors
        return torch.addcmul(grad, unit, torch.linalg.vecdot(unit, grad)[..., None], value=-1).div_(norm)


def sums_of_squares(x: torch.Tensor) -> torch.Tensor:
    """(...) fp32 sums over the last dimension of `x`, any floating dtype; outside of the graph."""
    return torch.linalg.vector_norm(x.detach(), dim=-1, dtype=torch.float32).square_()


def fixed_route(config: SoMEConfig, token_ids_T: torch.Tensor, seed: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(gates_TK fp32, expert_ids_TK int64)` of the routings that learn nothing, with equal gates.

    Args:
        config: `routing` hash: K distinct experts that are a random function of the token's id and the layer (Roller et al.
            2021, Hash Layers); shared: the first K experts.
        token_ids_T: int64 vocabulary ids.
        seed: with the layer it decides the hash.
        layer: index of the layer.
    """
    E, K = config.num_experts, config.top_k
    experts_E = torch.arange(E, device=token_ids_T.device)
    if config.routing == "hash":
        scores_TE = token_priorities(token_ids_T[:, None] * E + experts_E, derive_seed(seed, "hash", layer))
        expert_ids_TK = scores_TE.topk(K, dim=-1).indices
    else:
        expert_ids_TK = experts_E[:K].repeat(len(token_ids_T), 1)
    return torch.full(expert_ids_TK.shape, 1 / K, device=token_ids_T.device), expert_ids_TK


def route(
    queries_TD: torch.Tensor, keys_ED: torch.Tensor, top_k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(gates_TK fp32, expert_ids_TK int64)`: the K best keys by dot product in descending order, and the softmax of their
    scores divided by `temperature`. Gradients reach the queries through the gates only (specs section 2).
    """
    with torch.autocast(queries_TD.device.type, enabled=False):
        scores_TK, expert_ids_TK = _BestScores.apply(queries_TD, keys_ED, top_k)
        return torch.softmax(scores_TK / temperature, dim=-1), expert_ids_TK


class _BestScores(torch.autograd.Function):
    """The K largest dot products of each query with the keys, and whose they are.

    The gradient of a query is a sum of the K keys it chose. Left to autograd it would be a product of all keys with a matrix
    (T, E) that is almost all zeros.
    """

    @staticmethod
    def forward(ctx, queries_TD, keys_ED, top_k):
        scores_TK, expert_ids_TK = (queries_TD @ keys_ED.T).topk(top_k, dim=-1)
        ctx.save_for_backward(keys_ED, expert_ids_TK)
        ctx.mark_non_differentiable(expert_ids_TK)
        return scores_TK, expert_ids_TK

    @staticmethod
    def backward(ctx, grad_scores_TK, _):
        keys_ED, expert_ids_TK = ctx.saved_tensors
        grad_TD = F.embedding_bag(expert_ids_TK, keys_ED, per_sample_weights=grad_scores_TK.contiguous(), mode="sum")
        return grad_TD, None, None
