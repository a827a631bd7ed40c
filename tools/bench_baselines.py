"""What SoME layers are measured against: the algorithm as the definitions read, a dense block, and other libraries' layers.

Shapes: B sequences, S positions, T tokens, D width, F expert hidden width, E experts, K experts a token, r tokens of one
expert.
"""

import contextlib
import io
import logging
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import nn

from modeling.config import SoMEConfig
from modeling.key_rules import KeyRules
from modeling.some import KeyStore, SoMELayer
from modeling.some.experts import expert_weights


class StraightforwardLayer(SoMELayer):
    """A SoME layer as one would first write it: a module for each expert, a boolean mask for each module's tokens.

    Same arguments, experts, keys and results as `SoMELayer` in one process; the gradients are autograd's own.
    """

    def __init__(
        self,
        config: SoMEConfig,
        layer: int = 0,
        seed: int = 0,
        ep_group: None = None,
        pool_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        chunks: int = 1,
    ):
        assert ep_group is None, "it holds every expert"
        super().__init__(config, layer, seed, None, pool_dtype, device, chunks)
        self.pool = ExpertModules(config, layer, seed, pool_dtype, device)
        self.exchange = _no_exchange


class ExpertModules(nn.Module):
    """All experts of a layer, one module each; the same weights as `FrozenExpertPool`."""

    def __init__(self, config: SoMEConfig, layer: int, seed: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        draws = (expert_weights(config, seed, layer, e) for e in range(config.num_experts))
        self.experts = nn.ModuleList(_Expert([weight.to(device, dtype) for weight in weights]) for weights in draws)

    def describe_kernel(self) -> str:
        """How the experts compute, as `FrozenExpertPool` says it."""
        return "a module an expert"

    def forward(self, x_TD: torch.Tensor, gates_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> torch.Tensor:
        """(T, D): sum over a token's K experts of gate times output, in the dtype of `x_TD`."""
        y_TD = torch.zeros_like(x_TD)
        for e, expert in enumerate(self.experts):
            mask_TK = expert_ids_TK == e
            token_r, slot_r = mask_TK.nonzero(as_tuple=True)
            if not len(token_r):
                continue
            y_rD = gates_TK[token_r, slot_r, None] * expert(x_TD[token_r])
            y_TD.index_add_(0, token_r, y_rD.to(x_TD.dtype))
        return y_TD


class _Expert(nn.Module):
    """W_up gelu(W_down x + b_down) + b_up. Buffers, so that no optimizer sees them."""

    def __init__(self, weights: list[torch.Tensor]):
        super().__init__()
        for name, weight in zip(("w_down_FD", "w_up_DF", "b_down_F", "b_up_D"), weights, strict=True):
            self.register_buffer(name, weight, persistent=False)

    def forward(self, x_rD: torch.Tensor) -> torch.Tensor:
        h_rF = F.linear(x_rD.to(self.w_down_FD.dtype), self.w_down_FD, self.b_down_F)
        return F.linear(F.gelu(h_rF), self.w_up_DF, self.b_up_D)


def _no_exchange(
    x_TD: torch.Tensor, gates_TK: torch.Tensor, expert_ids_TK: torch.Tensor, pool: ExpertModules
) -> torch.Tensor:
    return pool(x_TD, gates_TK, expert_ids_TK)


def why_not_pairwise(rules: KeyRules) -> str | None:
    """Why `pairwise_update` cannot compute these rules; None if it can."""
    fits = rules.usage == "average" and rules.attract == "slots" and rules.peer_mass in ("min", "max")
    fits = fits and rules.normalise == "all" and rules.decay == "after" and rules.respawn_threshold == 0
    return None if fits else "its key update is that of the rules v2.1, v2.2, v3, v4 and v5 only"


@torch.no_grad()
def pairwise_update(store: KeyStore, queries_TD: torch.Tensor, expert_ids_TK: torch.Tensor, gates_TK: torch.Tensor) -> None:
    """Move the keys of `store` as the published code does: every token pulls at its experts, every pair at each other.

    Gathers and scatters one row a token and slot, and two a token and pair of slots (specs 3.2 to 3.6).
    """
    rules, E, K = store.rules, len(store.keys), expert_ids_TK.shape[1]
    store.steps += 1
    counts_E = torch.bincount(expert_ids_TK.flatten(), minlength=E).float()
    gate_sums_E = torch.zeros_like(counts_E).index_add_(0, expert_ids_TK.flatten(), gates_TK.flatten())
    store.usage.copy_(rules.ema_decay * store.usage + (1 - rules.ema_decay) * counts_E)
    store.usage_mass.copy_(rules.ema_decay * store.usage_mass + (1 - rules.ema_decay) * gate_sums_E)
    mass_E, keys_ED = 1 + store.usage, store.keys.clone()

    if rules.use_alpha:
        for slot in range(K):
            e_T = expert_ids_TK[:, slot]
            pulls_TD = (rules.alpha / mass_E[e_T])[:, None] * (queries_TD - keys_ED[e_T])
            keys_ED.index_add_(0, e_T, pulls_TD)
    if rules.use_beta:
        choose, attracted_ED = torch.minimum if rules.peer_mass == "min" else torch.maximum, keys_ED.clone()
        for left, right in combinations(range(K), 2):
            i_T, j_T = expert_ids_TK[:, left], expert_ids_TK[:, right]
            weights_T = rules.beta / choose(mass_E[i_T], mass_E[j_T])
            pulls_TD = weights_T[:, None] * (attracted_ED[j_T] - attracted_ED[i_T])
            keys_ED.index_add_(0, i_T, pulls_TD)
            keys_ED.index_add_(0, j_T, pulls_TD, alpha=-1)
    keys_ED = F.normalize(keys_ED, dim=-1)
    used_u = store.usage[store.usage > 0]
    if rules.use_delta and store.steps > rules.warmup_steps and len(used_u):
        rare_E = store.usage < torch.quantile(used_u, rules.theta_percentile)
        keys_ED[rare_E] *= 1 - rules.delta
    store.keys.copy_(keys_ED)


class DenseFrozen(nn.Module):
    """One frozen FFN of width K * F: the FLOPs of K experts a token, without routing."""

    def __init__(self, config: SoMEConfig, dtype: torch.dtype, device: torch.device):
        super().__init__()
        D, H = config.d_model, config.top_k * config.d_ffn
        self.register_buffer("w_down", torch.randn(H, D, device=device).div_(D**0.5).to(dtype))
        self.register_buffer("w_up", torch.randn(D, H, device=device).div_(H**0.5).to(dtype))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return F.linear(F.gelu(F.linear(x_BSD, self.w_down)), self.w_up)


class DeepSpeedMoE(nn.Module):
    """DeepSpeed's own layer on one rank: nothing is dropped, a linear gate is trained, the experts are frozen.

    Raises:
        ImportError: DeepSpeed cannot be imported.
    """

    NOTE = "DeepSpeed's layer has a linear gate and pads every expert to the tokens of the busiest one"

    def __init__(self, config: SoMEConfig, dtype: torch.dtype, device: torch.device):
        super().__init__()
        with contextlib.redirect_stdout(io.StringIO()):  # its greeting
            from deepspeed.moe.layer import MoE

            logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
            D, H = config.d_model, config.d_ffn
            expert = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)).to(dtype)
            self.moe = MoE(
                D, expert, num_experts=config.num_experts, k=config.top_k, drop_tokens=False, use_rts=False, min_capacity=0
            ).to(device)
        self.moe.deepspeed_moe.experts.requires_grad_(False)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return self.moe(x_BSD)[0]


class HuggingFaceMoE(nn.Module):
    """The sparse block of Qwen3-MoE (transformers 4 or 5), its gate trained and its experts frozen.

    Raises:
        ImportError: transformers is not installed.
    """

    NOTE = (
        "Hugging Face's block has a linear gate; its experts have three matrices (SwiGLU) and two thirds of the width, to a "
        "multiple of 16: the same weights and FLOPs a token"
    )

    def __init__(self, config: SoMEConfig, dtype: torch.dtype, device: torch.device):
        super().__init__()
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        theirs = Qwen3MoeConfig(
            hidden_size=config.d_model,
            moe_intermediate_size=max(16, 16 * round(config.d_ffn * 2 / 3 / 16)),
            num_experts=config.num_experts,
            num_experts_per_tok=config.top_k,
            norm_topk_prob=True,
        )
        # Version 5 reads it where whole models set it; version 4 has a loop over experts and does not look.
        theirs._experts_implementation = "grouped_mm"
        self.block = Qwen3MoeSparseMoeBlock(theirs).to(device, dtype)
        with torch.no_grad():
            for parameter in self.block.parameters():  # version 5 leaves them uninitialised
                parameter.normal_(std=0.02)
        self.block.experts.requires_grad_(False)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        y = self.block(x_BSD)
        return y[0] if isinstance(y, tuple) else y  # version 4 returns the gate's scores too
