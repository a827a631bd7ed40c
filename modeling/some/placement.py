"""Which rank of an expert-parallel group holds which experts.

The exchange asks the placement and never computes an owner from an expert's id, so another placement needs no change there.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Placement:
    """`rank_of_E` (E,) int64: the owner of each expert; `slot_of_E` (E,) int64: its index in the owner's shard."""

    rank_of_E: torch.Tensor
    slot_of_E: torch.Tensor

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
        experts_E = torch.arange(num_experts)
        shard = num_experts // ep_size
        return Placement(rank_of_E=experts_E // shard, slot_of_E=experts_E % shard)

    def experts_of(self, rank: int) -> list[int]:
        """The experts that `rank` holds, in the order of its shard."""
        ids_e = (self.rank_of_E == rank).nonzero().flatten()
        return ids_e[self.slot_of_E[ids_e].argsort()].tolist()
