"""How tokens reach their experts and come back: within one process, or over the ranks of an expert-parallel group.

Both exchanges are called the same way and return the same sums. `LocalExchange` is the readable reference;
`AllToAllExchange` sends each token once to every rank that serves at least one of its experts, with its expert slots and
gates, and gets back that rank's gate-weighted partial sum. Nothing is dropped and no capacity is set.

It does so in chunks: while the experts compute on one, the next is on its way and the sums of the one before travel back.

Every rank of a group runs the same collectives in the same order, forward and backward, whatever it sends: a rank without
tokens takes part with zero rows and stays in the autograd graph.

Shapes: T this rank's tokens, D width, K experts a token, P ranks of the group, C chunks, S copies sent (token-rank pairs),
M copies received, c a chunk's share of S or M, R routed rows (token-expert pairs) computed here, e experts of this rank's
shard.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch.autograd.graph import get_gradient_edge

from modeling.some.copies import nearest_copies
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
        chunks: into how many parts this rank's tokens are cut; a token's sum is added in the same order whatever it is.
    """

    def __init__(self, placement: Placement, group: dist.ProcessGroup, chunks: int = 1):
        self.group, self.chunks = group, chunks
        self.place(placement)

    def place(self, placement: Placement) -> None:
        """From now on ask this placement; the pools must hold what it says."""
        self._nearest = nearest_copies(placement, dist.get_rank(self.group))

    def __call__(
        self, x_TD: torch.Tensor, gates_TK: torch.Tensor, expert_ids_TK: torch.Tensor, pool: FrozenExpertPool
    ) -> torch.Tensor:
        self._nearest = self._nearest.to(x_TD.device)
        rank_TK, slot_TK = self._nearest.serving(expert_ids_TK)
        copies = _Copies.of(rank_TK, slot_TK, self.chunks, self.group)
        return _RoundTrip.apply(x_TD, gates_TK, copies, pool)


@dataclass(frozen=True)
class _Copies:
    """What is sent and received: one copy of a token for each rank that serves any of its experts.

    `token_S` int64 tokens in order of (rank, chunk, token); `slots_SK` int32 the experts of the token that are served
    there, as slots of that rank's shard, -1 for the others; `sent_PC` and `received_PC` numbers of copies.
    """

    token_S: torch.Tensor
    slots_SK: torch.Tensor
    sent_PC: list[list[int]]
    received_PC: list[list[int]]
    group: dist.ProcessGroup

    @staticmethod
    def of(rank_TK: torch.Tensor, slot_TK: torch.Tensor, chunks: int, group: dist.ProcessGroup) -> "_Copies":
        """Chunks are runs of tokens, as equal as their number allows. One small collective, for the numbers."""
        ranks_P = torch.arange(dist.get_world_size(group), device=rank_TK.device)
        wanted_PT = (rank_TK == ranks_P[:, None, None]).any(-1)
        sent_PC = torch.stack([part.sum(1) for part in wanted_PT.tensor_split(chunks, dim=1)], dim=1)
        received_PC = torch.empty_like(sent_PC)
        dist.all_to_all_single(received_PC, sent_PC, group=group)

        rank_S, token_S = wanted_PT.nonzero(as_tuple=True)
        here_SK = rank_TK[token_S] == rank_S[:, None]
        slots_SK = torch.where(here_SK, slot_TK[token_S], -1).to(torch.int32)
        return _Copies(token_S, slots_SK, *torch.stack([sent_PC, received_PC]).tolist(), group)

    @property
    def chunks(self) -> int:
        return len(self.sent_PC[0])

    def send(self, rows_S: torch.Tensor) -> torch.Tensor:
        """(S, ...) rows of all chunks to (M, ...) rows in order of (rank, chunk, token)."""
        return _Transfer(rows_S, _sums(self.sent_PC), _sums(self.received_PC), self.group).wait()

    def send_back(self, rows_M: torch.Tensor) -> torch.Tensor:
        """The reverse of `send`."""
        return _Transfer(rows_M, _sums(self.received_PC), _sums(self.sent_PC), self.group).wait()

    def start_sending(self, rows_c: torch.Tensor, chunk: int) -> "_Transfer":
        """Start to send one chunk's rows, in order of rank."""
        return _Transfer(rows_c, _column(self.sent_PC, chunk), _column(self.received_PC, chunk), self.group)

    def start_sending_back(self, rows_c: torch.Tensor, chunk: int) -> "_Transfer":
        """Start the reverse of `start_sending`."""
        return _Transfer(rows_c, _column(self.received_PC, chunk), _column(self.sent_PC, chunk), self.group)


class _Transfer:
    """An all-to-all under way: (rows sent, ...) in order of destination to (rows received, ...) in order of origin."""

    def __init__(self, rows: torch.Tensor, outgoing_P: list[int], incoming_P: list[int], group: dist.ProcessGroup):
        # What is sent must live until it has left.
        self._sent, self._received = rows.contiguous(), rows.new_empty(sum(incoming_P), *rows.shape[1:])
        self._work = dist.all_to_all_single(self._received, self._sent, incoming_P, outgoing_P, group=group, async_op=True)

    def wait(self) -> torch.Tensor:
        """What arrived."""
        self._work.wait()
        return self._received


class _RoundTrip(torch.autograd.Function):
    """The whole way of tokens to their experts and back, one node, so that this code and not the order of an autograd graph
    says in which order collectives run.

    The experts of each chunk keep a graph of their own, and the backward goes through it. Of that graph only the ends are
    kept (gradient edges): the experts know best what their backward needs, and inputs and outputs are not part of it.
    """

    @staticmethod
    def forward(ctx, x_TD, gates_TK, copies, pool):
        assert gates_TK.dtype == torch.float32, "gates share a message with int32 slots"
        keep = any(ctx.needs_input_grad)
        routes_S2K = torch.cat([copies.slots_SK, gates_TK[copies.token_S].view(torch.int32)], dim=1)
        routes = _by_chunk(copies.send(routes_S2K), copies.received_PC)
        graphs = []

        def run_chunk(chunk: int, x_cD: torch.Tensor) -> torch.Tensor:
            slots_cK, gates_cK = routes[chunk].chunk(2, dim=1)
            gates_cK = gates_cK.contiguous().view(torch.float32)
            with torch.set_grad_enabled(keep):
                if keep:
                    x_cD, gates_cK = _GraphStart.apply(torch.empty(0, requires_grad=True), x_cD, gates_cK)
                y_cD = pool(x_cD, gates_cK, slots_cK.long())
            if keep:
                graphs.append([get_gradient_edge(end) for end in (y_cD, x_cD, gates_cK)])
            return y_cD.detach()

        y_TD = _there_and_back(x_TD, copies, run_chunk)
        ctx.copies, ctx.graphs, ctx.num_tokens = copies, graphs, len(x_TD)
        return y_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y_TD):
        copies, grads_gates = ctx.copies, []

        def run_chunk(chunk: int, grad_y_cD: torch.Tensor) -> torch.Tensor:
            y, *inputs = ctx.graphs[chunk]
            grad_x_cD, grad_gates_cK = torch.autograd.grad(y, inputs, grad_y_cD)
            grads_gates.append(grad_gates_cK)
            return grad_x_cD

        grad_x_TD = _there_and_back(grad_y_TD, copies, run_chunk)
        grad_gates_SK = copies.send_back(_by_rank(grads_gates, copies.received_PC))
        grad_gates_TK = grad_gates_SK.new_zeros(ctx.num_tokens, grad_gates_SK.shape[1])
        return grad_x_TD, grad_gates_TK.index_add_(0, copies.token_S, grad_gates_SK), None, None


class _GraphStart(torch.autograd.Function):
    """Makes tensors the start of a graph without being leaves, which a graph would keep alive."""

    @staticmethod
    def forward(ctx, anchor, x_cD, gates_cK):
        return x_cD.view_as(x_cD), gates_cK.view_as(gates_cK)

    @staticmethod
    def backward(ctx, *gradients):
        raise AssertionError("gradients are asked for at this node's outputs")


def _there_and_back(
    rows_TD: torch.Tensor, copies: _Copies, compute: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """(T, D) in the dtype of `rows_TD`: for each token the sum of what `compute(chunk, rows_cD)` makes of its copies.

    A token's copies are added in fp32, in order of ranks, so the sum does not depend on the chunks.
    """
    tokens = _by_chunk(copies.token_S, copies.sent_PC)
    sum_TD = torch.zeros(rows_TD.shape, dtype=torch.float32, device=rows_TD.device)
    going, returning = copies.start_sending(rows_TD[tokens[0]], 0), None
    for chunk in range(copies.chunks):
        following = chunk + 1
        next_going = copies.start_sending(rows_TD[tokens[following]], following) if following < copies.chunks else None
        computed_cD = compute(chunk, going.wait())
        if returning is not None:
            sum_TD.index_add_(0, tokens[chunk - 1], returning.wait().float())
        going, returning = next_going, copies.start_sending_back(computed_cD, chunk)
    sum_TD.index_add_(0, tokens[-1], returning.wait().float())
    return sum_TD.to(rows_TD.dtype)


def _by_chunk(rows: torch.Tensor, count_PC: list[list[int]]) -> list[torch.Tensor]:
    """Rows in order of (rank, chunk) as one tensor a chunk, in order of rank."""
    parts, chunks = rows.split([count for count_C in count_PC for count in count_C]), len(count_PC[0])
    return [torch.cat(parts[chunk::chunks]) for chunk in range(chunks)]


def _by_rank(rows_of_chunks: list[torch.Tensor], count_PC: list[list[int]]) -> torch.Tensor:
    """The reverse of `_by_chunk`."""
    parts = [rows.split(_column(count_PC, chunk)) for chunk, rows in enumerate(rows_of_chunks)]
    return torch.cat([of_chunk[rank] for rank in range(len(count_PC)) for of_chunk in parts])


def _sums(count_PC: list[list[int]]) -> list[int]:
    return [sum(count_C) for count_C in count_PC]


def _column(count_PC: list[list[int]], chunk: int) -> list[int]:
    return [count_C[chunk] for count_C in count_PC]
