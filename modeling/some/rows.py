"""The routed rows of a shard: one row for every token at every one of its experts, sorted by expert.

Shapes: T tokens, K experts a token, N = T * K rows, of which the first R are of experts in the shard, e experts of the
shard.
"""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RoutedRows:
    """`pairs_N` int64: t * K + k of each row; `tokens_N` int64: its token t; `row_of_TK` int64: the row of each of a token's
    experts, -1 where the expert is not in the shard; `ends_e` int64: where the rows of each expert end. An expert's rows are
    in the order of their tokens. Made without waiting for the device; `rows_e` waits."""

    pairs_N: torch.Tensor
    tokens_N: torch.Tensor
    row_of_TK: torch.Tensor
    ends_e: torch.Tensor

    @staticmethod
    def of(slots_TK: torch.Tensor, experts: int) -> "RoutedRows":
        """Sort by expert.

        Args:
            slots_TK: int64 places of the experts in the shard; -1 = not there.
            experts: experts in the shard.
        """
        elsewhere_TK = slots_TK < 0
        slots_N, pairs_N = slots_TK.masked_fill(elsewhere_TK, experts).flatten().sort(stable=True)
        row_of_N = torch.empty_like(pairs_N)
        row_of_N[pairs_N] = torch.arange(len(pairs_N), device=pairs_N.device)
        ends_e = torch.searchsorted(slots_N, torch.arange(experts, device=slots_N.device), right=True)
        return RoutedRows(
            pairs_N, pairs_N // slots_TK.shape[1], row_of_N.view(slots_TK.shape).masked_fill(elsewhere_TK, -1), ends_e
        )

    @functools.cached_property
    def rows_e(self) -> list[int]:
        """Number of rows of each expert."""
        return self.ends_e.diff(prepend=self.ends_e.new_zeros(1)).tolist()

    def sort(self, values_TK: torch.Tensor) -> torch.Tensor:
        """(N,) values in the order of the rows."""
        return values_TK.flatten()[self.pairs_N]

    def unsort(self, values_N: torch.Tensor) -> torch.Tensor:
        """(T, K) values of the rows, zero where the expert is not in the shard."""
        return values_N[self.row_of_TK.clamp(min=0)].masked_fill_(self.row_of_TK < 0, 0.0)
