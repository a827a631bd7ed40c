"""Which copy of an expert serves a token.

Shapes: T tokens, K experts a token, E experts, C most copies that any expert has.
"""

from dataclasses import dataclass

import torch

from modeling.some.placement import Placement


@dataclass(frozen=True)
class NearestCopies:
    """`count_E` (E,) int64, copies that take turns; `rank_EC` and `slot_EC` (E, C) int64, where they are: rank, and place in
    the rank's shard. Entries beyond an expert's count repeat its first copy."""

    count_E: torch.Tensor
    rank_EC: torch.Tensor
    slot_EC: torch.Tensor

    def to(self, device: torch.device) -> "NearestCopies":
        """The same on another device."""
        return NearestCopies(self.count_E.to(device), self.rank_EC.to(device), self.slot_EC.to(device))

    def serving(self, expert_ids_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(rank_TK, slot_TK)` int64, who serves each choice; the t-th token takes the expert's copy t modulo copies."""
        position_T1 = torch.arange(len(expert_ids_TK), device=expert_ids_TK.device)[:, None]
        turn_TK = position_T1 % self.count_E[expert_ids_TK]
        return self.rank_EC[expert_ids_TK, turn_TK], self.slot_EC[expert_ids_TK, turn_TK]


def nearest_copies(placement: Placement, rank: int) -> NearestCopies:
    """Where `rank` sends its choices: to itself if it holds the expert, else to all copies in turn.

    Tokens that are spread evenly over the ranks then load the copies of an expert evenly.
    """
    copies_E: list[list[tuple[int, int]]] = [[] for _ in placement.copies_E()]
    for holder, expert_ids in enumerate(placement.expert_ids_P):
        for slot, expert in enumerate(expert_ids):
            copies_E[expert].append((holder, slot))
    copies_E = [[c for c in copies if c[0] == rank] or copies for copies in copies_E]
    most = max(map(len, copies_E))
    padded_EC2 = torch.tensor([copies + [copies[0]] * (most - len(copies)) for copies in copies_E])
    return NearestCopies(torch.tensor([len(copies) for copies in copies_E]), padded_EC2[..., 0], padded_EC2[..., 1])
