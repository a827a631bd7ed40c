"""Which rank of an expert-parallel group holds which experts; which copy of one serves a token is in `copies.py`.

The exchange asks the placement and never computes an owner from an expert's id, so another placement needs no change there.
The maps are those of EPLB (DeepSeek): slot to expert, expert to slots, copies an expert.

Shapes: E experts, P ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass


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
