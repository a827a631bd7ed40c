"""The routed rows of a shard: one row for every token at every one of its experts, sorted by expert.

Shapes: T tokens, K experts a token, R rows, e experts of the shard.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RoutedRows:
    """`pairs_R` int64: t * K + k of each row; `tokens_R` int64: its token t; `row_of_TK` int64: the row of each of a token's
    experts, -1 where the expert is not in the shard; `rows_e`: number of rows of each expert. An expert's rows are in the
    order of their tokens."""

    pairs_R: torch.Tensor
    tokens_R: torch.Tensor
    row_of_TK: torch.Tensor
    rows_e: list[int]

    @staticmethod
    def of(slots_TK: torch.Tensor, experts: int) -> "RoutedRows":
        """Sort by expert.

        Args:
            slots_TK: int64 places of the experts in the shard; -1 = not there.
            experts: experts in the shard.
        """
        slots_N, pairs_N = slots_TK.flatten().sort(stable=True)
        elsewhere, *rows_e = torch.bincount(slots_N + 1, minlength=experts + 1).tolist()
        row_of_N = torch.empty_like(pairs_N)
        row_of_N[pairs_N] = torch.arange(-elsewhere, len(pairs_N) - elsewhere, device=pairs_N.device).clamp_(min=-1)
        pairs_R = pairs_N[elsewhere:]
        return RoutedRows(pairs_R, pairs_R // slots_TK.shape[1], row_of_N.view(slots_TK.shape), rows_e)

    def sort(self, values_TK: torch.Tensor) -> torch.Tensor:
        """(R,) values of the rows."""
        return values_TK.flatten()[self.pairs_R]

    def unsort(self, values_R: torch.Tensor) -> torch.Tensor:
        """(T, K) values of the rows, zero where there is none."""
        padded_R1 = torch.cat([values_R, values_R.new_zeros(1)])
        return padded_R1[self.row_of_TK]
