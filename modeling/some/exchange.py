"""How tokens reach their experts and come back: within one process, or over the ranks of an expert-parallel group.

Both exchanges are called the same way and return the same sums. `LocalExchange` is the readable reference;
`AllToAllExchange` sends each token once to every rank that holds at least one of its experts, with its expert slots and
gates, and gets back that rank's gate-weighted partial sum. Nothing is dropped and no capacity is set.

Every rank of a group runs the same collectives in the same order, forward and backward, whatever it sends: a rank without
tokens takes part with zero rows and stays in the autograd graph.

Shapes: T this rank's tokens, D width, K experts a token, P ranks of the group, S copies sent (token-rank pairs),
M copies received, R routed rows (token-expert pairs) computed here, e experts of this rank's shard.
"""

from typing import Protocol

import torch
import torch.distributed as dist

from modeling.some.experts import FrozenExpertPool
from modeling.some.placement import Placement


class Exchange(Protocol):
    """What a SoME layer needs of an exchange."""

    def __call__(
        self, x_TD: torch.Tensor, gates_TK: torch.Tensor, expert_ids_TK: torch.Tensor, pool: FrozenExpertPool
    ) -> torch.Tensor:
        """(T, D): for each token the gate-weighted sum of its K experts' outputs, in the dtype of `x_TD`."""


class LocalExchange:
    """Every expert lives here."""

    def __call__(
        self, x_TD: torch.Tensor, gates_TK: torch.Tensor, expert_ids_TK: torch.Tensor, pool: FrozenExpertPool
    ) -> torch.Tensor:
        return pool(x_TD, gates_TK, expert_ids_TK)


class AllToAllExchange:
    """The experts are sharded over the ranks of `group`.

    Args:
        placement: who holds which expert.
        group: the expert-parallel group of this rank; its size is the placement's number of ranks.
    """

    def __init__(self, placement: Placement, group: dist.ProcessGroup):
        self.placement, self.group = placement, group

    def __call__(
        self, x_TD: torch.Tensor, gates_TK: torch.Tensor, expert_ids_TK: torch.Tensor, pool: FrozenExpertPool
    ) -> torch.Tensor:
        ranks = dist.get_world_size(self.group)
        rank_TK = self.placement.rank_of_E.to(x_TD.device)[expert_ids_TK]
        slot_TK = self.placement.slot_of_E.to(x_TD.device)[expert_ids_TK]

        # One copy per (destination, token), in order of destination; of a token's K experts it names those that live there.
        wanted_PT = (rank_TK == torch.arange(ranks, device=x_TD.device)[:, None, None]).any(-1)
        rank_S, token_S = wanted_PT.nonzero(as_tuple=True)
        here_SK = rank_TK[token_S] == rank_S[:, None]
        slots_SK = torch.where(here_SK, slot_TK[token_S], -1).to(torch.int32)

        sent_P = wanted_PT.sum(1)
        received_P = torch.empty_like(sent_P)
        dist.all_to_all_single(received_P, sent_P, group=self.group)
        splits = _Splits(sent=sent_P.tolist(), received=received_P.tolist(), group=self.group)

        slots_MK = splits.send(slots_SK)
        x_MD, gates_MK = _Dispatch.apply(x_TD[token_S], gates_TK[token_S], splits)
        partial_MD = pool(x_MD, gates_MK, slots_MK.long())
        partial_SD = _Return.apply(partial_MD, splits)

        # A token's partial sums are added in fp32, in order of ranks.
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
        return y_TD.index_add(0, token_S, partial_SD.float()).to(x_TD.dtype)


class _Splits:
    """How many rows go to and come from each rank, and the all-to-all in both directions."""

    def __init__(self, sent: list[int], received: list[int], group: dist.ProcessGroup):
        self.sent, self.received, self.group = sent, received, group

    def send(self, rows_S: torch.Tensor) -> torch.Tensor:
        """(S, ...) rows in order of destination to (M, ...) rows in order of origin."""
        return self._exchange(rows_S, self.sent, self.received)

    def send_back(self, rows_M: torch.Tensor) -> torch.Tensor:
        """The reverse of `send`."""
        return self._exchange(rows_M, self.received, self.sent)

    def _exchange(self, rows: torch.Tensor, outgoing: list[int], incoming: list[int]) -> torch.Tensor:
        result = rows.new_empty(sum(incoming), *rows.shape[1:])
        dist.all_to_all_single(result, rows.contiguous(), incoming, outgoing, group=self.group)
        return result


class _Dispatch(torch.autograd.Function):
    """Send inputs and gates; in the backward their gradients come back. One node, so that the two collectives of every rank
    run in the same order."""

    @staticmethod
    def forward(ctx, x_SD, gates_SK, splits):
        ctx.splits = splits
        return splits.send(x_SD), splits.send(gates_SK)

    @staticmethod
    def backward(ctx, grad_x_MD, grad_gates_MK):
        return ctx.splits.send_back(grad_x_MD), ctx.splits.send_back(grad_gates_MK), None


class _Return(torch.autograd.Function):
    """Bring partial sums back to the tokens' rank; in the backward their gradients go out again."""

    @staticmethod
    def forward(ctx, partial_MD, splits):
        ctx.splits = splits
        return splits.send_back(partial_MD)

    @staticmethod
    def backward(ctx, grad_SD):
        return ctx.splits.send(grad_SD), None
