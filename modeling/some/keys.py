"""The key store: which token goes to which expert, learned by rule.

After an optimizer step every layer's keys move by sums over the step's real tokens (specs 3.10): counts per expert and
slot, query sums and co-selection counts. Sums of shards add up, so they are accumulated over micro batches, all-reduced
over ranks, and then every rank applies the same update to bitwise equal keys.

The rule here is v4 (specs 3.8): usage average, attraction slot by slot, peer pull, normalisation, decay.

Shapes: T tokens, D width, E experts, K slots (the k-th choice of a token).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from modeling.config import KeyRules
from modeling.seeding import derive_generator


@dataclass
class KeyStatistics:
    """Sums over tokens of one layer: all that an update needs.

    `counts_EK` int32 tokens with expert e in slot k; `pairs_EE` int32 tokens with both experts, diagonal 0; `query_sums_KED`
    fp32 sum of the queries with expert e in slot k; `gate_mass_E` fp32 sum of gates.
    """

    counts_EK: torch.Tensor
    pairs_EE: torch.Tensor
    query_sums_KED: torch.Tensor
    gate_mass_E: torch.Tensor

    @staticmethod
    def of(
        num_experts: int,
        queries_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        gates_TK: torch.Tensor | None = None,
        mask_T: torch.Tensor | None = None,
    ) -> "KeyStatistics":
        """Sums over the tokens where `mask_T` (all when None)."""
        if mask_T is not None:
            queries_TD, expert_ids_TK = queries_TD[mask_T], expert_ids_TK[mask_T]
            gates_TK = None if gates_TK is None else gates_TK[mask_T]
        E, K, D = num_experts, expert_ids_TK.shape[1], queries_TD.shape[1]
        slots_TK = expert_ids_TK * K + torch.arange(K, device=expert_ids_TK.device)
        counts = _count(slots_TK.flatten(), E * K).view(E, K)

        left, right = torch.triu_indices(K, K, offset=1, device=expert_ids_TK.device)
        pairs = _count((expert_ids_TK[:, left] * E + expert_ids_TK[:, right]).flatten(), E * E).view(E, E)

        query_sums = queries_TD.new_zeros(K, E, D, dtype=torch.float32)
        for slot in range(K):
            query_sums[slot].index_add_(0, expert_ids_TK[:, slot], queries_TD.float())
        gate_mass = torch.zeros(E, device=queries_TD.device)
        if gates_TK is not None:
            gate_mass.index_add_(0, expert_ids_TK.flatten(), gates_TK.float().flatten())
        return KeyStatistics(counts, pairs + pairs.T, query_sums, gate_mass)

    def add_(self, other: "KeyStatistics") -> "KeyStatistics":
        """Add the sums of other tokens in place."""
        self.counts_EK += other.counts_EK
        self.pairs_EE += other.pairs_EE
        self.query_sums_KED += other.query_sums_KED
        self.gate_mass_E += other.gate_mass_E
        return self


def _count(index_N: torch.Tensor, size: int) -> torch.Tensor:
    """How often each of 0 .. size-1 occurs; integer sums, so the order of addition cannot matter."""
    counts = torch.zeros(size, dtype=torch.int32, device=index_N.device)
    return counts.index_add_(0, index_N, torch.ones_like(index_N, dtype=torch.int32))


class KeyStore(nn.Module):
    """Keys and usage of one layer. Persistent buffers, equal on every rank, fp32 whatever the model's dtype.

    Attributes:
        keys: (E, D) fp32; rows start as random unit vectors.
        usage: (E,) fp32 moving average of the tokens an expert gets per update.
        usage_mass: (E,) fp32 the same of gate weight; for metrics.
        steps: int, updates applied.
        respawns: int, keys drawn anew since the start; rule v4 has no respawn, so it stays 0.
    """

    def __init__(self, num_experts: int, d_model: int, top_k: int, rules: KeyRules, seed: int = 0, layer: int = 0):
        super().__init__()
        self.top_k, self.rules, self.steps, self.respawns = top_k, rules, 0, 0
        keys = torch.randn(num_experts, d_model, generator=derive_generator(seed, "keys", layer))
        self.register_buffer("keys", F.normalize(keys, dim=-1))
        self.register_buffer("usage", torch.zeros(num_experts))
        self.register_buffer("usage_mass", torch.zeros(num_experts))

    def _apply(self, fn, recurse=True):
        """Follow a move to another device but not a change of dtype: routing and keys are fp32."""
        for name, buffer in list(self.named_buffers(recurse=False)):
            setattr(self, name, buffer.to(fn(buffer).device))
        return self

    def get_extra_state(self) -> int:
        return self.steps

    def set_extra_state(self, state: int) -> None:
        self.steps = int(state)

    @torch.no_grad()
    def update(
        self,
        queries_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        gates_TK: torch.Tensor | None = None,
        mask_T: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """One update from one batch of tokens.

        Args:
            queries_TD: fp32 unit queries.
            expert_ids_TK: int64 chosen experts, best first.
            gates_TK: fp32 gates, for `usage_mass`.
            mask_T: bool, the tokens that count; all when None.
            generator: for rules that draw at random; v4 does not.
            group: ranks over which the sums are all-reduced; None = this rank alone.
        """
        del generator
        statistics = KeyStatistics.of(len(self.keys), queries_TD, expert_ids_TK, gates_TK, mask_T)
        update_key_stores([self], [statistics], group)

    def attraction(self, counts_EK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the K sequential attraction steps do to a key, as one affine map (specs 3.3).

        With eta_k = alpha n_k / (1 + u), slot after slot: key <- (1 - eta_k) key + alpha / (1 + u) * query_sum_k. Unrolled:
        key <- keep_E * key + sum_k weights_EK * query_sum_k.
        """
        step_E = self.rules.alpha / (1 + self.usage) if self.rules.use_alpha else torch.zeros_like(self.usage)
        shrink_EK = 1 - step_E[:, None] * counts_EK
        keep_E = torch.ones_like(self.usage)
        weights_EK = torch.empty_like(shrink_EK)
        for slot in reversed(range(self.top_k)):
            weights_EK[:, slot] = step_E * keep_E
            keep_E = keep_E * shrink_EK[:, slot]
        return keep_E, weights_EK

    def apply_update(self, keep_E: torch.Tensor, pull_ED: torch.Tensor, pairs_EE: torch.Tensor) -> None:
        """Move the keys: attraction (`keep_E`, `pull_ED`), peer pull (`pairs_EE`), normalisation, decay."""
        rules = self.rules
        keys_ED = keep_E[:, None] * self.keys + pull_ED
        if rules.use_beta and self.top_k > 1:
            mass_E = 1 + self.usage
            weights_EE = rules.beta * pairs_EE / torch.minimum(mass_E[:, None], mass_E)
            keys_ED = keys_ED + weights_EE @ keys_ED - weights_EE.sum(1, keepdim=True) * keys_ED
        keys_ED = F.normalize(keys_ED, dim=-1)
        used_u = self.usage[self.usage > 0]
        if rules.use_delta and self.steps > rules.warmup_steps and len(used_u):
            rare_E = self.usage < torch.quantile(used_u, rules.theta_percentile)
            keys_ED = torch.where(rare_E[:, None], (1 - rules.delta) * keys_ED, keys_ED)
        self.keys.copy_(keys_ED)


@torch.no_grad()
def update_key_stores(
    stores: Sequence[KeyStore], statistics: Sequence[KeyStatistics], group: dist.ProcessGroup | None = None
) -> None:
    """One update of every layer's key store from its statistics, summed over the ranks of `group` (None = this rank).

    Two collectives for all layers together: integer counts first; with the global counts known, the K attraction slots
    fold into one (E, D) sum a layer, which is the second.
    """
    counts = [s.counts_EK for s in statistics]
    pairs = [s.pairs_EE for s in statistics]
    _all_reduce_together([*counts, *pairs], group)

    maps = []
    for store, stats in zip(stores, statistics, strict=True):
        rho = store.rules.ema_decay
        store.steps += 1
        store.usage.mul_(rho).add_(stats.counts_EK.sum(1), alpha=1 - rho)
        maps.append(store.attraction(stats.counts_EK))
    pulls = [
        torch.einsum("ek,ked->ed", weights_EK, stats.query_sums_KED)
        for (_, weights_EK), stats in zip(maps, statistics, strict=True)
    ]
    masses = [s.gate_mass_E for s in statistics]
    _all_reduce_together([*pulls, *masses], group)

    for store, (keep_E, _), pull_ED, pairs_EE, mass_E in zip(stores, maps, pulls, pairs, masses, strict=True):
        store.usage_mass.mul_(store.rules.ema_decay).add_(mass_E, alpha=1 - store.rules.ema_decay)
        store.apply_update(keep_E, pull_ED, pairs_EE)


def _all_reduce_together(tensors: list[torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum equal-dtype tensors over the ranks in place, in one collective."""
    if group is None:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def key_store_hashes(stores: Sequence[KeyStore]) -> torch.Tensor:
    """(L,) int64, one hash per layer of the exact bytes of keys and usage; cheap enough to compare often."""
    hashes = []
    for store in stores:
        bits = torch.cat([store.keys.flatten(), store.usage]).view(torch.int32).to(torch.int64)
        weights = torch.arange(1, len(bits) + 1, device=bits.device) * 2654435761
        hashes.append((bits * weights).sum())
    return torch.stack(hashes)
