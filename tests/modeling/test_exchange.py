"""Expert parallelism on real ranks, against the loops over tokens of the specification."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from modeling.some import SoMEConfig, SoMELayer
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


def make(case: dict, group) -> SoMELayer:
    config = SoMEConfig(
        d_model=12, num_experts=8, d_ffn=20, top_k=case.get("top_k", 3), router=case.get("router", "mlp"), temperature=0.7
    )
    torch.manual_seed(0)
    layer = SoMELayer(config, layer=1, seed=2, ep_group=group)
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
    return {name: _forward_backward(rank, case) for name, case in CASES.items()}


def _forward_backward(rank: int, case: dict) -> tuple:
    layer = make(case, dist.group.WORLD)
    x_TD, weight_TD = inputs(case, rank)
    x_TD.requires_grad_()
    y_BSD, routing = layer(x_TD[None])
    (y_BSD[0] * weight_TD).sum().backward()
    gradients = query_gradients(layer)
    for gradient in gradients:
        dist.all_reduce(gradient)
    return y_BSD[0].detach(), x_TD.grad, routing.expert_ids_TK, gradients, layer.pool.expert_ids


@pytest.fixture(scope="module", params=[2, 4])
def sharded(request) -> list[dict[str, tuple]]:
    """Every case's results, rank by rank, from one world of processes."""
    return run_ranks(_forward_backward_all, request.param)


@pytest.mark.parametrize("name", CASES)
def test_sharded_layer_equals_the_specification(sharded, name):
    case, results = CASES[name], [of_rank[name] for of_rank in sharded]
    assert sorted(e for *_, experts in results for e in experts) == list(range(8)), "each expert lives on one rank"
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


class SentRows(TorchDispatchMode):
    """Records the size of every all-to-all's input, in elements, by dtype."""

    def __init__(self):
        super().__init__()
        self.sent: list[tuple[torch.dtype, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.c10d.alltoall_base_.default:
            self.sent.append((args[1].dtype, args[1].numel()))
        return function(*args, **(kwargs or {}))


def _count_rows(rank: int) -> tuple[int, int, list[int]]:
    layer = make(dict(top_k=3), dist.group.WORLD)
    x_TD = torch.randn(50, 12, generator=torch.Generator().manual_seed(rank), requires_grad=True)
    with SentRows() as counted:
        y_BSD, routing = layer(x_TD[None])
        y_BSD.sum().backward()
    owners_TK = Placement.contiguous(8, 4).rank_of_E[routing.expert_ids_TK]
    copies = sum(len(set(owners)) for owners in owners_TK.tolist())
    rows = [n for dtype, n in counted.sent if dtype == torch.float32]
    return copies, sum(len(set(o) - {rank}) for o in owners_TK.tolist()), rows


def test_one_copy_of_a_token_per_rank_in_either_direction():
    for copies, elsewhere, sent in run_ranks(_count_rows, 4):
        assert elsewhere < copies < 50 * 3, "some tokens must have two experts on one rank, or nothing is tested"
        # Forward: inputs, gates, partial sums of the received tokens; backward: their gradients, mirrored.
        x, gates, partial, grad_partial, grad_x, grad_gates = sent
        assert x == grad_partial == copies * 12
        assert gates == copies * 3
        assert partial == grad_x and grad_gates * 12 == grad_x * 3


def test_placement_covers_every_expert_once():
    placement = Placement.contiguous(12, 4)
    assert [placement.experts_of(rank) for rank in range(4)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    with pytest.raises(ValueError, match=r"parallel.ep_size = 5 does not divide .* = 12; sizes that do: 1, 2, 3, 4, 6, 12"):
        Placement.contiguous(12, 5)
