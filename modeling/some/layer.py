"""One SoME layer, in the order the data flows: query -> route -> exchange -> experts -> combine.

Shapes: B sequences, S positions, T real tokens, D width, K experts a token.
"""

import torch
import torch.distributed as dist
from torch import nn

from modeling.config import SoMEConfig
from modeling.some.exchange import AllToAllExchange, LocalExchange
from modeling.some.experts import FrozenExpertPool
from modeling.some.keys import KeyStore
from modeling.some.placement import Placement
from modeling.some.router import QueryNetwork, Routing, fixed_route, route, sums_of_squares


class SoMELayer(nn.Module):
    """Replaces a feed-forward block.

    Args:
        config: sizes and conventions of the layer.
        layer: its index in the model; with `seed` it decides keys and experts.
        seed: the experiment's seed.
        ep_group: ranks that share one copy of the pool; None or a group of one = all experts here.
        pool_dtype: dtype of the frozen experts.
        device: where pool and keys are kept.
        chunks: parts in which tokens are sent to other ranks (see `AllToAllExchange`).

    Raises:
        ValueError: the group's size does not divide the experts.
    """

    def __init__(
        self,
        config: SoMEConfig,
        layer: int = 0,
        seed: int = 0,
        ep_group: dist.ProcessGroup | None = None,
        pool_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        chunks: int = 1,
    ):
        super().__init__()
        self.config = config
        ep_size = 1 if ep_group is None else dist.get_world_size(ep_group)
        self.ep_rank = 0 if ep_size == 1 else dist.get_rank(ep_group)
        self.placement = Placement.contiguous(config.num_experts, ep_size)
        self.exchange = LocalExchange() if ep_size == 1 else AllToAllExchange(self.placement, ep_group, chunks)
        expert_ids = self.placement.expert_ids_P[self.ep_rank]

        self.query = QueryNetwork(config).to(device) if config.routing == "learned" else None
        self.store = KeyStore(config.num_experts, config.d_model, config.top_k, config.rules, seed, layer).to(device)
        self.gain_E = nn.Parameter(torch.ones(config.num_experts, device=device)) if config.learned_gain else None
        self.pool = FrozenExpertPool(config, layer, seed, expert_ids, pool_dtype, device)

    def forward(
        self,
        x_BSD: torch.Tensor,
        mask_BS: torch.Tensor | None = None,
        temperature: float | None = None,
        residual_BSD: torch.Tensor | None = None,
        input_ids_BS: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Routing]:
        """What the experts add to the residual stream, and how the tokens were routed.

        Args:
            x_BSD: input of query network and experts, any floating dtype.
            mask_BS: bool, True at real tokens; padding is not routed and gets zero. None: all are real.
            temperature: of the gates; None = the config's, for training or evaluation.
            residual_BSD: the stream that the output is added to, for the measure RMS(experts) / RMS(residual);
                None = `x_BSD`.
            input_ids_BS: int64 vocabulary ids; only hash routing looks at them.

        Returns:
            (B, S, D) in the dtype of `x_BSD`, without the residual, and a `Routing` of the T real tokens.
        """
        real_BS = slice(None) if mask_BS is None else mask_BS.bool()
        x_TD = x_BSD[real_BS].reshape(-1, x_BSD.shape[-1])
        residual_TD = x_TD if residual_BSD is None else residual_BSD[real_BS].reshape(x_TD.shape)

        if self.query is None:
            queries_TD = x_TD.float()
            if input_ids_BS is None and self.config.routing == "hash":
                raise ValueError("input_ids_BS = None, but model.some.routing = hash goes by token ids; pass them")
            ids_BS = torch.zeros(x_BSD.shape[:2], dtype=torch.int64) if input_ids_BS is None else input_ids_BS
            token_ids_T = ids_BS.to(x_BSD.device)[real_BS].flatten()
            gates_TK, expert_ids_TK = fixed_route(self.config, token_ids_T, self.store.seed, self.store.layer)
        else:
            # On padding too, then dropped: so the shapes of the products repeat from batch to batch and kernels that are
            # compiled for a shape are reused.
            queries_TD = self.query(x_BSD)[real_BS].reshape(x_TD.shape)
            gates_TK, expert_ids_TK = route(queries_TD, self.store.keys, self.config.top_k, self._temperature(temperature))
        swaps = self.config.permute_in_evaluation and not self.training
        serving_TK = (expert_ids_TK + 1) % self.config.num_experts if swaps else expert_ids_TK
        weights_TK = gates_TK if self.gain_E is None else gates_TK * self.gain_E.float()[expert_ids_TK]
        y_TD = self.exchange(x_TD, weights_TK, serving_TK, self.pool)

        if mask_BS is None:
            y_BSD = y_TD.view_as(x_BSD)
        else:
            y_BSD = torch.zeros_like(x_BSD).masked_scatter(real_BS[..., None], y_TD)
        return y_BSD, Routing(
            queries_TD=queries_TD.detach(),
            expert_ids_TK=expert_ids_TK,
            gates_TK=gates_TK.detach(),
            output_squares_T=sums_of_squares(y_TD),
            residual_squares_T=sums_of_squares(residual_TD),
        )

    def place(self, placement: Placement) -> None:
        """From now on find the experts where `placement` says; all ranks of `ep_group` call it alike, between two steps.

        Experts that are new here are drawn from the seed, so nothing is sent.
        """
        self.pool.hold(placement.expert_ids_P[self.ep_rank])
        self.exchange.place(placement)
        self.placement = placement

    def _temperature(self, temperature: float | None) -> float:
        if temperature is not None:
            return temperature
        if not self.training and self.config.eval_temperature is not None:
            return self.config.eval_temperature
        return self.config.temperature
