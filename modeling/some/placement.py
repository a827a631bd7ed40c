"""Which rank of an expert-parallel group holds which experts, and which copy of an expert serves a token.

The exchange asks the placement and never computes an owner from an expert's id, so another placement needs no change there.
The maps are those of EPLB (DeepSeek): slot to expert, expert to slots, copies an expert.

Shapes: T tokens, K experts a token, E experts, C most copies that any expert has, P ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Placement:
    """Every expert on at least one rank, and no more than once on any.

    `expert_ids_P`: for each rank the experts it holds, in the order of its shard.
    """

    expert_ids_P: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        held = {expert for expert_ids in self.expert_ids_P for expert in expert_ids}
        assert held == set(range(len(held))), "every expert needs an owner"
        assert all(len(set(ids)) == len(ids) > 0 for ids in self.expert_ids_P), (
            "one copy a rank, and no rank without experts"
        )

    @staticmethod
    def contiguous(num_experts: int, ep_size: int) -> "Placement":
        """Rank r holds the r-th block of `num_experts / ep_size` experts.

        Raises:
            ValueError: ep_size does not divide the experts.
        """
        if num_experts % ep_size:
            sizes = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
            raise ValueError(
                f"parallel.ep_size = {ep_size} does not divide model.some.num_experts = {num_experts}; "
                f"sizes that do: {', '.join(map(str, sizes))}"
            )
        shard = num_experts // ep_size
        return Placement(tuple(tuple(range(rank * shard, (rank + 1) * shard)) for rank in range(ep_size)))

    @property
    def num_ranks(self) -> int:
        """P."""
        return len(self.expert_ids_P)

    @property
    def num_replicas(self) -> int:
        """Copies beyond the first, over all ranks."""
        return sum(copies - 1 for copies in self.copies_E())

    def copies_E(self) -> list[int]:
        """On how many ranks each expert is."""
        copies_E = [0] * len({expert for expert_ids in self.expert_ids_P for expert in expert_ids})
        for expert_ids in self.expert_ids_P:
            for expert in expert_ids:
                copies_E[expert] += 1
        return copies_E

    def load_P(self, load_E: Sequence[float]) -> list[float]:
        """What each rank gets of the experts' loads when the copies of an expert share its load evenly."""
        copies_E = self.copies_E()
        return [sum(load_E[expert] / copies_E[expert] for expert in expert_ids) for expert_ids in self.expert_ids_P]

    def max_over_mean(self, load_E: Sequence[float]) -> float:
        """Load of the busiest rank over the mean; 1 where there is no load at all."""
        load_P = self.load_P(load_E)
        total = sum(load_P)
        return max(load_P) * len(load_P) / total if total > 0 else 1.0

    def num_moved_from(self, other: "Placement") -> int:
        """How many (expert, rank) pairs are here that are not in `other`: what has to be materialised."""
        pairs = zip(self.expert_ids_P, other.expert_ids_P, strict=True)
        return sum(len(set(ours) - set(theirs)) for ours, theirs in pairs)

    def nearest(self, rank: int) -> "NearestCopies":
        """Where `rank` sends its choices: to itself if it holds the expert, else to all copies in turn.

        Tokens that are spread evenly over the ranks then load the copies of an expert evenly.
        """
        copies_E: list[list[tuple[int, int]]] = [[] for _ in self.copies_E()]
        for holder, expert_ids in enumerate(self.expert_ids_P):
            for slot, expert in enumerate(expert_ids):
                copies_E[expert].append((holder, slot))
        copies_E = [[c for c in copies if c[0] == rank] or copies for copies in copies_E]
        most = max(map(len, copies_E))
        padded_EC2 = torch.tensor([copies + [copies[0]] * (most - len(copies)) for copies in copies_E])
        return NearestCopies(torch.tensor([len(copies) for copies in copies_E]), padded_EC2[..., 0], padded_EC2[..., 1])


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
