"""Sums over tokens: all that an update of a key store needs (specs 3.10).

Sums of shards add up, so they are accumulated over micro batches and all-reduced over ranks.

Shapes: T tokens, D width, E experts, K slots (the k-th choice of a token).
"""

from dataclasses import dataclass

import torch

from modeling.some.respawn import Candidates


@dataclass
class KeyStatistics:
    """Sums over tokens of one layer: all that an update needs.

    `counts_EK` int32 tokens with expert e in slot k; `pairs_EE` int32 tokens with both experts, diagonal 0; `query_sums_KED`
    fp32 sum of the queries with expert e in slot k; `gate_mass_E` fp32 sum of gates; `candidates` the tokens that dead keys
    may be put on, None where the rule never does.
    """

    counts_EK: torch.Tensor
    pairs_EE: torch.Tensor
    query_sums_KED: torch.Tensor
    gate_mass_E: torch.Tensor
    candidates: Candidates | None = None

    @staticmethod
    def of(
        num_experts: int,
        queries_TD: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        gates_TK: torch.Tensor | None = None,
        mask_T: torch.Tensor | None = None,
        candidates: Candidates | None = None,
    ) -> "KeyStatistics":
        """Sums over the tokens where `mask_T` (all when None); `candidates` as `KeyStore.candidates` gives them."""
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
            ids_N, gates_N = expert_ids_TK.flatten(), gates_TK.double().flatten()
            if ids_N.is_cuda:
                gate_mass = gate_mass.double().index_add_(0, ids_N, gates_N).float()
            else:
                gate_mass = torch.bincount(ids_N, gates_N, minlength=E).float()
        return KeyStatistics(counts, pairs + pairs.T, query_sums, gate_mass, candidates)

    def add_(self, other: "KeyStatistics") -> "KeyStatistics":
        """Add the sums of other tokens in place."""
        self.counts_EK += other.counts_EK
        self.pairs_EE += other.pairs_EE
        self.query_sums_KED += other.query_sums_KED
        self.gate_mass_E += other.gate_mass_E
        if self.candidates is not None:
            self.candidates = self.candidates.merge(other.candidates, limit=len(self.counts_EK))
        return self


def _count(index_N: torch.Tensor, size: int) -> torch.Tensor:
    """(size,) int32: how often each of 0 .. size-1 occurs; integer sums, so the order of addition cannot matter."""
    if index_N.is_cuda:  # bincount waits for the host there
        ones_N = torch.ones_like(index_N, dtype=torch.int32)
        return torch.zeros(size, dtype=torch.int32, device=index_N.device).index_add_(0, index_N, ones_N)
    return torch.bincount(index_N, minlength=size).to(torch.int32)
