"""The language model, top to bottom: embedding and positions, L blocks of (attention, channel mixer), head.

Shapes: B sequences, S positions, N = B * S, D width, H heads, V vocabulary, T positions with a target.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from modeling.config import ModelConfig
from modeling.cross_entropy import NO_TARGET, cross_entropy
from modeling.mixers import ChannelMixer
from modeling.seeding import derive_seed
from modeling.some.layer import SoMELayer
from modeling.some.router import Routing


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """`logits` (B, S, V), or None where targets were given; `losses_T` fp32 cross entropy in nats of every position with a
    target, or None; `routing` one record a SoME layer."""

    logits: torch.Tensor | None
    losses_T: torch.Tensor | None
    routing: list[Routing]


class SelfAttention(nn.Module):
    """Multi-head attention with biases, through the fused kernel.

    No padding mask: sequences are padded on the right, so under the causal mask no real token can see padding.
    """

    def __init__(self, d_model: int, num_heads: int, causal: bool):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        B, S, D = x_BSD.shape
        qkv = self.qkv(x_BSD).view(B, S, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        if x_BSD.device.type == "cpu":
            # The CPU kernel's backward is up to four times slower in bf16 than in fp32, and slower on strided input.
            qkv = qkv.float().contiguous()
        # Unbound, not indexed: three indices would each fill a gradient of the size of all.
        q_BHSd, k_BHSd, v_BHSd = qkv.unbind()
        mixed_BHSd = F.scaled_dot_product_attention(q_BHSd, k_BHSd, v_BHSd, is_causal=self.causal)
        return self.out(mixed_BHSd.transpose(1, 2).reshape(B, S, D).to(x_BSD.dtype))


class Block(nn.Module):
    """A token mixer and a channel mixer, each with a residual; norms before (`pre`) or after the sum (`post`)."""

    def __init__(self, config: ModelConfig, mixer: ChannelMixer):
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.attention = SelfAttention(config.d_model, config.num_heads, config.causal)
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.mixer = mixer
        self.mixer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        x_BSD: torch.Tensor,
        mask_BS: torch.Tensor | None,
        temperature: float | None,
        input_ids_BS: torch.Tensor,
    ) -> tuple[torch.Tensor, Routing | None]:
        if self.pre_norm:
            h_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
            y_BSD, routing = self.mixer(self.mixer_norm(h_BSD), h_BSD, mask_BS, temperature, input_ids_BS)
            return h_BSD + y_BSD, routing
        h_BSD = self.attention_norm(x_BSD + self.attention(x_BSD))
        y_BSD, routing = self.mixer(h_BSD, h_BSD, mask_BS, temperature, input_ids_BS)
        return self.mixer_norm(h_BSD + y_BSD), routing


class Transformer(nn.Module):
    """See `build_model`."""

    def __init__(self, config: ModelConfig, mixers: list[ChannelMixer]):
        super().__init__()
        self.config = config
        D = config.d_model
        self.embedding = nn.Embedding(config.vocab_size, D)
        nn.init.normal_(self.embedding.weight, std=D**-0.5 if config.embedding_init == "scaled" else 1.0)
        self.register_buffer("positions_SD", sinusoidal_positions(config.max_seq_len, D), persistent=False)
        self.blocks = nn.ModuleList(Block(config, mixer) for mixer in mixers)
        # Without parameters: the head is affine and absorbs them, and both norm positions keep the same parameter count.
        self.final_norm = nn.LayerNorm(D, elementwise_affine=False) if config.norm_position == "pre" else nn.Identity()
        self.head = nn.Linear(D, config.vocab_size)

    def forward(
        self,
        input_ids_BS: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        temperature: float | None = None,
        targets_BS: torch.Tensor | None = None,
    ) -> ModelOutput:
        """Args:
            input_ids_BS: int64 token ids, padded on the right.
            attention_mask: (B, S) bool or int, non-zero at real tokens; None = all are real.
            temperature: of the gates; None = the config's.
            targets_BS: int64 next tokens, -100 where there is none; losses are then returned instead of logits.

        Raises:
            ValueError: input longer than `max_seq_len`, or a mask with padding before a real token.
        """
        S = input_ids_BS.shape[1]
        if S > self.config.max_seq_len:
            raise ValueError(f"input of {S} tokens is longer than model.max_seq_len = {self.config.max_seq_len}")
        mask_BS = None if attention_mask is None else attention_mask.bool()
        if mask_BS is not None and bool((mask_BS[:, 1:] & ~mask_BS[:, :-1]).any()):
            raise ValueError("attention_mask has padding before a real token; pad on the right")

        x_BSD = math.sqrt(self.config.d_model) * self.embedding(input_ids_BS)
        x_BSD = x_BSD + self.positions_SD[:S].to(x_BSD.dtype)
        routing = []
        for block in self.blocks:
            x_BSD, record = block(x_BSD, mask_BS, temperature, input_ids_BS)
            if record is not None:
                routing.append(record)
        x_BSD = self.final_norm(x_BSD)

        logits_BSV = self.head(x_BSD)
        if targets_BS is None:
            return ModelOutput(logits=logits_BSV, losses_T=None, routing=routing)
        losses_N = cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())
        return ModelOutput(logits=None, losses_T=losses_N[targets_BS.flatten() != NO_TARGET], routing=routing)

    @property
    def some_layers(self) -> list[SoMELayer]:
        """The SoME layers, first to last; none in a model with another channel mixer."""
        return [block.mixer.some for block in self.blocks if block.mixer.some is not None]


def sinusoidal_positions(length: int, d_model: int) -> torch.Tensor:
    """(length, d_model) fp32: PE[p, 2i] = sin(p / 10000^(2i/D)), PE[p, 2i+1] = cos of the same (specs 1.1)."""
    position_S1 = torch.arange(length)[:, None]
    rate = torch.exp(torch.arange(0, d_model, 2) * (-math.log(10000.0) / d_model))
    table_SD = torch.empty(length, d_model)
    table_SD[:, 0::2] = torch.sin(position_S1 * rate)
    table_SD[:, 1::2] = torch.cos(position_S1 * rate)
    return table_SD


def build_model(
    config: ModelConfig,
    seed: int = 0,
    ep_group: dist.ProcessGroup | None = None,
    pool_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    exchange_chunks: int = 1,
) -> Transformer:
    """A model with this rank's share of the frozen experts; the same trained values on every rank.

    Args:
        config: the model.
        seed: decides every value.
        ep_group: ranks that share one copy of each layer's pool; None = all experts on this rank.
        pool_dtype: dtype of the frozen experts (the trained core is made in fp32).
        device: where everything is kept.
        exchange_chunks: parts in which a rank's tokens are sent to other ranks, so that sending and computing overlap.
    """
    # Linear and embedding layers draw from the global generator: seed it for the draw and put it back.
    with torch.random.fork_rng(devices=[]):
        # Two draws, so that models that differ in their channel mixers alone share every other value.
        torch.manual_seed(derive_seed(seed, "mixers"))
        mixers = [
            ChannelMixer(config, layer, seed, ep_group, pool_dtype, device, exchange_chunks)
            for layer in range(config.num_layers)
        ]
        torch.manual_seed(derive_seed(seed, "core"))
        return Transformer(config, mixers).to(device)
