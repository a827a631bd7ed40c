"""What follows attention in a block: a SoME layer, a trained or frozen FFN, or nothing, with what may go before and after.

Shapes: B sequences, S positions, T real tokens, D width.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from modeling.config import ModelConfig, SoMEConfig
from modeling.some.experts import FrozenExpertPool, pool_manifest
from modeling.some.layer import SoMELayer
from modeling.some.router import Routing, sums_of_squares


class ChannelMixer(nn.Module):
    """Input map (optional) -> SoME layer, FFN or nothing -> readout (optional).

    The readout normalises the combined output, so that its size is no longer that of the random experts, and learns from
    zero how to use it: a random signal is let in only as far as it helps.

    Args:
        config: the model.
        layer: index of the block.
        seed: decides frozen values and keys.
        ep_group: ranks that share one copy of the expert pool.
        pool_dtype: dtype of frozen weights.
        device: where they are kept.
        exchange_chunks: parts in which tokens are sent to other ranks.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        seed: int,
        ep_group: dist.ProcessGroup | None,
        pool_dtype: torch.dtype,
        device: torch.device | str,
        exchange_chunks: int = 1,
    ):
        super().__init__()
        D, kind = config.d_model, config.channel_mixer
        self.some = self.dense = self.frozen = None
        if kind == "some":
            self.some = SoMELayer(config.some, layer, seed, ep_group, pool_dtype, device, exchange_chunks)
        elif kind == "dense":
            self.dense = nn.Sequential(nn.Linear(D, config.d_ffn), nn.GELU(), nn.Linear(config.d_ffn, D))
        elif kind == "frozen_dense":
            self.frozen = FrozenExpertPool(frozen_config(config), layer, seed, dtype=pool_dtype, device=device)
        self.input_map = nn.Linear(D, D) if config.input_map else None
        self.readout = nn.Linear(D, D) if config.readout else None
        if self.readout is not None:
            nn.init.zeros_(self.readout.weight)
            nn.init.zeros_(self.readout.bias)

    def forward(
        self,
        x_BSD: torch.Tensor,
        residual_BSD: torch.Tensor,
        mask_BS: torch.Tensor | None,
        temperature: float | None,
        input_ids_BS: torch.Tensor,
    ) -> tuple[torch.Tensor, Routing | None]:
        """What is added to the residual stream, in the dtype of `x_BSD`, and how a SoME layer routed (None without one)."""
        if self.input_map is not None:
            x_BSD = x_BSD + self.input_map(x_BSD)
        routing = None
        if self.some is not None:
            y_BSD, routing = self.some(x_BSD, mask_BS, temperature, residual_BSD, input_ids_BS)
        elif self.dense is not None:
            y_BSD = self.dense(x_BSD)
        elif self.frozen is not None:
            y_BSD = self._frozen_ffn(x_BSD.flatten(0, 1)).view_as(x_BSD)
        else:
            y_BSD = F.gelu(x_BSD) if self.readout is not None else torch.zeros_like(x_BSD)
        if self.readout is None:
            return y_BSD, routing
        # The usual epsilon would damp the output of `sparse` experts, whose variance is 4e-5.
        y_BSD = self.readout(F.layer_norm(y_BSD, y_BSD.shape[-1:], eps=1e-8))
        if routing is not None:
            added_TD = y_BSD if mask_BS is None else y_BSD[mask_BS]
            routing = replace(routing, output_squares_T=sums_of_squares(added_TD).flatten())
        return y_BSD, routing

    def _frozen_ffn(self, x_TD: torch.Tensor) -> torch.Tensor:
        """One expert that every position goes to."""
        gates_T1 = torch.ones(len(x_TD), 1, device=x_TD.device)
        return self.frozen(x_TD, gates_T1, torch.zeros_like(gates_T1, dtype=torch.int64))


def frozen_config(config: ModelConfig) -> SoMEConfig | None:
    """How a block's frozen weights are drawn; None where a model has none. A `frozen_dense` FFN is drawn as one expert."""
    if config.channel_mixer == "some":
        return config.some
    if config.channel_mixer == "frozen_dense":
        return replace(config.some, num_experts=1, top_k=1, d_ffn=config.d_ffn)
    return None


def frozen_manifest(config: ModelConfig, seed: int) -> dict:
    """What identifies a model's frozen weights without their bytes (see `pool_manifest`); empty without any."""
    frozen = frozen_config(config)
    return {} if frozen is None else pool_manifest(frozen, config.num_layers, seed)
