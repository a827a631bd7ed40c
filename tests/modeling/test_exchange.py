"""Expert parallelism on real ranks, against the loops over tokens of the specification."""

from math import comb
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from modeling.some import SoMEConfig, SoMELayer
from modeling.some.balance import balanced_placement
from modeling.some.copies import nearest_copies
from modeling.some.exchange import _Copies, _there_and_back
from modeling.some.placement import Placement
from tests.distributed import run_ranks
from tests.modeling.test_layer import oracle, query_gradients

CASES = {
    "even": dict(tokens=[9, 9, 9, 9]),
    "uneven": dict(tokens=[12, 1, 5, 3]),
    "zero-token ranks": dict(tokens=[0, 7, 0, 4]),
    "no tokens at all": dict(tokens=[0, 0, 0, 0]),
    "all tokens to one expert": dict(tokens=[6, 3, 5, 2], top_k=1, one_expert=True),
    "k = 1": dict(tokens=[6, 3, 0, 2], top_k=1),
    "k = all": dict(tokens=[4, 3, 5, 2], top_k=8),
    "linear router": dict(tokens=[4, 3, 5, 2], router="linear"),
}

LOAD_E = [5, 1, 9, 2, 2, 1, 7, 1]
# Numbers of chunks and of replicas; None = contiguous.
WAYS = {"whole": (1, None), "chunks": (3, None), "replicas": (1, 3), "replicas and chunks": (2, 5)}


def make(case: dict, group, chunks: int = 1, replicas: int | None = None) -> SoMELayer:
    config = SoMEConfig(
        d_model=12, num_experts=8, d_ffn=20, top_k=case.get("top_k", 3), router=case.get("router", "mlp"), temperature=0.7
    )
    torch.manual_seed(0)
    layer = SoMELayer(config, layer=1, seed=2, ep_group=group, chunks=chunks)
    if replicas is not None:
        layer.place(balanced_placement(LOAD_E, dist.get_world_size(group), replicas))
    if case.get("one_expert"):
        layer.store.keys[:] = 0
        layer.store.keys[5] = layer.query(inputs(case, 0)[0])[:1].detach()
        layer.store.keys[:5] = layer.store.keys[6:] = -layer.store.keys[5]
        layer.query[-1].bias.data += 100 * layer.store.keys[5]
    return layer


def inputs(case: dict, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + rank)
    T = case["tokens"][rank]
    return torch.randn(max(T, 1), 12, generator=generator)[:T], torch.randn(max(T, 1), 12, generator=generator)[:T]


def _forward_backward_all(rank: int) -> dict[str, tuple]:
    ways = [(name, way) for name in CASES for way in WAYS]
    return {f"{name}, {way}": _forward_backward(rank, CASES[name], *WAYS[way]) for name, way in ways}


def _forward_backward(rank: int, case: dict, chunks: int, replicas: int | None) -> tuple:
    layer = make(case, dist.group.WORLD, chunks, replicas)
    x_TD, weight_TD = inputs(case, rank)
    x_TD.requires_grad_()
    y_BSD, routing = layer(x_TD[None])
    (y_BSD[0] * weight_TD).sum().backward()
    gradients = query_gradients(layer)
    for gradient in gradients:
        dist.all_reduce(gradient)
    return y_BSD[0].detach(), x_TD.grad, routing.expert_ids_TK, gradients, layer.pool.expert_ids


class Sent(TorchDispatchMode):
    """Records every all-to-all: dtype, and the elements for each rank."""

    def __init__(self):
        super().__init__()
        self.messages: list[tuple[torch.dtype, list[int]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.c10d.alltoall_base_.default:
            rows, splits = args[1], args[4]
            self.messages.append((rows.dtype, [n * rows[:1].numel() for n in splits] or [rows.numel()]))
        return function(*args, **(kwargs or {}))


def _traffic_of_a_layer(rank: int, chunks: int, replicas: int | None) -> tuple[list[list[int]], list[list[int]]]:
    """The messages of a layer with 50 tokens on a rank, but none on rank 1; for each token its ranks."""
    layer, ranks = make(dict(top_k=3), dist.group.WORLD, chunks, replicas), dist.get_world_size()
    T = 0 if rank == 1 else 50
    x_TD = torch.randn(50, 12, generator=torch.Generator().manual_seed(rank))[:T].requires_grad_()
    with Sent() as sent:
        y_BSD, routing = layer(x_TD[None])
        y_BSD.sum().backward()
    owners_TK = nearest_copies(layer.placement, rank).serving(routing.expert_ids_TK)[0].tolist()
    counts_TP = [[int(r in owners) for r in range(ranks)] for owners in owners_TK]
    return [(str(dtype), elements) for dtype, elements in sent.messages], counts_TP


def _rows_sent_elsewhere(rank: int, E: int = 16, K: int = 4, T: int = 3000) -> int:
    generator = torch.Generator().manual_seed(rank)
    expert_ids_TK = torch.rand(T, E, generator=generator).topk(K).indices
    rank_TK, slot_TK = nearest_copies(Placement.contiguous(E, dist.get_world_size()), rank).serving(expert_ids_TK)
    with Sent() as sent:
        copies = _Copies.of(rank_TK, slot_TK, 1, dist.group.WORLD)
        copies.send(torch.zeros(len(copies.token_S), 1))
    elements = sent.messages[-1][1]
    return sum(elements) - elements[rank]


def _sums_by_chunks(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    ranks_P = torch.arange(dist.get_world_size())
    rows_TD, rank_TK = torch.randn(11, 5, generator=generator), torch.randint(len(ranks_P), (11, 4), generator=generator)
    sums = []
    for chunks in (1, 2, 5, 11, 20):
        copies = _Copies.of(rank_TK, torch.zeros_like(rank_TK), chunks, dist.group.WORLD)
        sums.append(_there_and_back(rows_TD, copies, lambda chunk, rows_cD: (rank + 0.1) * rows_cD))
    weight_T1 = ((rank_TK[:, None] == ranks_P[:, None]).any(-1) * (ranks_P + 0.1)).sum(1, keepdim=True)
    return [weight_T1 * rows_TD, *sums]


def _all(rank: int) -> dict[str, Any]:
    return {
        "layers": _forward_backward_all(rank),
        "traffic": {way: _traffic_of_a_layer(rank, *WAYS[way]) for way in WAYS},
        "sent elsewhere": _rows_sent_elsewhere(rank),
        "sums": _sums_by_chunks(rank),
    }


@pytest.fixture(scope="module", params=[2, 4])
def world(request) -> list[dict[str, Any]]:
    """What each rank of a world found: starting one takes longer than all it does."""
    return run_ranks(_all, request.param)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_sharded_layer_equals_the_specification(world, name, way):
    case, results = CASES[name], [of_rank["layers"][f"{name}, {way}"] for of_rank in world]
    held = sorted(e for *_, experts in results for e in experts)
    assert set(held) == set(range(8)) and len(held) == 8 + (WAYS[way][1] or 0)
    layer, total = make(case, None), None
    for rank, (y_TD, grad_TD, expert_ids_TK, *_) in enumerate(results):
        x_TD, weight_TD = inputs(case, rank)
        if len(x_TD) == 0:
            assert y_TD.shape == grad_TD.shape == (0, 12)
            continue
        x_TD, expected_TD, expected_ids_TK, _, weights = oracle(layer, x_TD, 0.7)
        (expected_TD * weight_TD).sum().backward()
        assert torch.equal(expert_ids_TK, expected_ids_TK)
        if case.get("one_expert"):
            assert (expert_ids_TK == 5).all()
        torch.testing.assert_close(y_TD.double(), expected_TD, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grad_TD.double(), x_TD.grad, atol=1e-5, rtol=1e-5)
        gradients = [p.grad for pair in weights for p in pair]
        total = gradients if total is None else [a + b for a, b in zip(total, gradients, strict=True)]
    for _, _, _, gradients, _ in results:
        for ours, theirs in zip(gradients, total or [torch.zeros(())] * len(gradients), strict=True):
            torch.testing.assert_close(ours.double(), theirs.expand_as(ours).double(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_one_copy_of_a_token_per_rank_in_either_direction(world, way):
    results, chunks, P, D, K = [of_rank["traffic"][way] for of_rank in world], WAYS[way][0], len(world), 12, 3
    # copies[a][b]: tokens of rank a of which rank b serves an expert.
    copies = [[sum(column) for column in zip(*counts_TP, strict=True)] or [0] * P for _, counts_TP in results]
    assert sum(map(sum, copies)) < 50 * (P - 1) * K, "some tokens must have two experts on one rank, or nothing is tested"
    for rank, (messages, _) in enumerate(results):
        there, back = copies[rank], [copies[origin][rank] for origin in range(P)]
        (counts_type, counts), (routes_type, routes), *rows = messages
        assert (counts_type, sum(counts)) == ("torch.int64", P * chunks)
        assert (routes_type, routes) == ("torch.int32", [2 * K * n for n in there])
        # Inputs and sums of each chunk, their gradients, and the gradients of all gates.
        assert [dtype for dtype, _ in rows] == ["torch.float32"] * (4 * chunks + 1)
        assert rows.pop()[1] == [K * n for n in back]
        # Chunk i + 1 leaves before the sums of chunk i return.
        outward = [0, *range(1, 2 * chunks - 1, 2)]
        outward += [2 * chunks + index for index in outward]
        sums = [[0] * P, [0] * P]
        for index, (_, elements) in enumerate(rows):
            total = sums[0 if index in outward else 1]
            total[:] = [a + b for a, b in zip(total, elements, strict=True)]
        assert sums == [[2 * D * n for n in there], [2 * D * n for n in back]]


def test_rows_on_the_wire_are_as_many_as_expected_of_even_routing(world):
    E, K, T, P = 16, 4, 3000, len(world)
    sent = sum(of_rank["sent elsewhere"] for of_rank in world)
    # A rank serves none of a token's experts if all K are among those of the others.
    others = P - 1
    assert sent == pytest.approx(P * T * others * (1 - comb(E - E // P, K) / comb(E, K)), rel=0.01)
    assert sent < 0.75 * P * T * K * others / P, "one copy an expert would be many more"


def test_chunks_change_no_bit_of_the_sums(world):
    for expected_TD, whole_TD, *chunked in [of_rank["sums"] for of_rank in world]:
        torch.testing.assert_close(whole_TD, expected_TD)
        assert all(torch.equal(sum_TD, whole_TD) for sum_TD in chunked)
