"""Who chooses the experts, and what may be switched about it: query networks, fixed routes, swapped and biased experts."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from modeling.some import FrozenExpertPool, KeyRules, SoMEConfig, SoMELayer
from modeling.some.router import _Normalise, fixed_route
from modeling.some.weights import expert_weights
from tests.distributed import run_ranks
from tests.oracles.layer import expert_output, some_layer_per_token

FIXED = KeyRules.preset("fixed")
IDS_BS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(7))


def make_layer(group=None, seed: int = 2, layer: int = 1, **changes) -> SoMELayer:
    if changes.get("routing", "learned") != "learned":
        changes["rules"] = FIXED
    config = SoMEConfig(**{"d_model": 12, "num_experts": 6, "d_ffn": 20, "top_k": 2, "temperature": 0.7, **changes})
    torch.manual_seed(0)
    return SoMELayer(config, layer=layer, seed=seed, ep_group=group)


def inputs(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(seed))


def experts_of(config: SoMEConfig, order=lambda e: e):
    """The weights of an expert, drawn again from seed 2 and layer 1; `order`: which expert stands in for which."""

    def weights(e: int):
        w_down_FD, w_up_DF, b_down_F, b_up_D = expert_weights(config, 2, 1, order(e))
        return tuple(w.double() for w in (w_down_FD, b_down_F, w_up_DF, b_up_D))

    return weights


def oracle(layer: SoMELayer, x_BSD: torch.Tensor, order=lambda e: e, temperature: float = 0.7):
    """`(x_TD, y_TD, expert_ids_TK, gates_TK, query weights)` of the specification in float64, ready for a backward."""
    weights = [(m.weight.detach().double(), m.bias.detach().double()) for m in layer.query if hasattr(m, "weight")]
    for pair in weights:
        for tensor in pair:
            tensor.requires_grad_()
    x_TD = x_BSD.detach().double().flatten(0, 1).requires_grad_()
    config = layer.config
    result = some_layer_per_token(
        x_TD, weights, layer.store.keys, experts_of(config, order), config.top_k, temperature,
        normalise_query=config.normalise_query,
    )  # fmt: skip
    return x_TD, *result, weights


@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_initial_values_of_the_query_network(router):
    normal, default = (
        make_layer(d_model=128, router=router, router_mult=3.0, router_init=init).query for init in ("normal", "torch")
    )
    for ours, theirs in zip(normal, default, strict=True):
        if not isinstance(ours, torch.nn.Linear):
            continue
        assert not ours.bias.any() and theirs.bias.any()
        assert ours.weight.mean().item() == pytest.approx(0, abs=1e-3)
        assert ours.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert ours.weight.abs().max() > 0.06, "normal, not uniform"
        assert theirs.weight.abs().max() <= theirs.in_features**-0.5
        assert theirs.weight.std().item() == pytest.approx((3 * theirs.in_features) ** -0.5, rel=0.02)


@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_raw_queries_score_as_in_v1(router):
    layer = make_layer(normalise_query=False, router=router)
    layer.store.keys.mul_(torch.tensor([1.0, 0.2, 3.0, 1.0, 0.5, 2.0])[:, None])  # products then differ from cosines
    x_BSD = (3 * inputs()).requires_grad_()
    weight_TD = torch.randn(18, 12, generator=torch.Generator().manual_seed(1))
    y_BSD, routing = layer(x_BSD)
    (y_BSD.view(18, 12) * weight_TD).sum().backward()
    x_TD, y_TD, expert_ids_TK, gates_TK, weights = oracle(layer, x_BSD)
    (y_TD * weight_TD).sum().backward()
    assert torch.equal(routing.expert_ids_TK, expert_ids_TK)
    gradients = [g for m in layer.query if hasattr(m, "weight") for g in (m.weight.grad, m.bias.grad)]
    for ours, theirs in [
        (y_BSD.view(18, 12), y_TD),
        (routing.gates_TK, gates_TK),
        (x_BSD.grad.view(18, 12), x_TD.grad),
        *zip(gradients, [t.grad for pair in weights for t in pair], strict=True),
    ]:
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-4)
    norms_T = routing.queries_TD.norm(dim=-1)
    assert norms_T.max() / norms_T.min() > 1.2, "of any length, as the update of v1.1 takes them"
    unit = make_layer(router=router)
    unit.store.keys.copy_(layer.store.keys)
    assert not torch.allclose(unit(x_BSD)[1].gates_TK, routing.gates_TK, atol=1e-2)


def test_a_frozen_router_has_nothing_to_train_and_lets_gradients_pass():
    layer = make_layer(train_router=False)
    assert not [p for p in layer.parameters() if p.requires_grad] and len(list(layer.query.parameters())) == 4
    x_BSD = inputs().requires_grad_()
    weight_TD = torch.randn(18, 12, generator=torch.Generator().manual_seed(1))
    y_BSD, routing = layer(x_BSD)
    (y_BSD.view(18, 12) * weight_TD).sum().backward()
    assert all(p.grad is None for p in layer.parameters())
    x_TD, y_TD, _, gates_TK, _ = oracle(layer, x_BSD)
    (y_TD * weight_TD).sum().backward()
    torch.testing.assert_close(x_BSD.grad.view(18, 12).double(), x_TD.grad, atol=1e-5, rtol=1e-5)

    # What arrives by way of the experts alone: the part that passes through gates and query network is not nothing.
    alone_TD = x_BSD.detach().double().flatten(0, 1).requires_grad_()
    experts, total = experts_of(layer.config), 0.0
    for x_D, ids_K, gates_K, weight_D in zip(alone_TD, routing.expert_ids_TK, gates_TK.detach(), weight_TD, strict=True):
        for e, gate in zip(ids_K.tolist(), gates_K, strict=True):
            total = total + gate * (expert_output(x_D, experts(e)) * weight_D).sum()
    total.backward()
    assert (x_TD.grad - alone_TD.grad).abs().max() > 1e-3
    trained = make_layer()
    assert torch.equal(trained.query[0].weight, layer.query[0].weight), "it stays where the trained one starts"


class TestHash:
    CONFIG = SoMEConfig(d_model=12, num_experts=64, d_ffn=4, top_k=4, routing="hash", rules=FIXED)

    def route(self, ids, seed: int = 2, layer: int = 1, config: SoMEConfig = CONFIG) -> torch.Tensor:
        return fixed_route(config, torch.as_tensor(ids), seed, layer)[1]

    def test_distinct_experts_with_equal_gates(self):
        gates_TK, expert_ids_TK = fixed_route(self.CONFIG, torch.arange(3000), 2, 1)
        assert gates_TK.shape == expert_ids_TK.shape == (3000, 4)
        assert (gates_TK == 0.25).all() and gates_TK.dtype == torch.float32
        assert all(len(set(ids)) == 4 for ids in expert_ids_TK.tolist())
        assert expert_ids_TK.min() >= 0 and expert_ids_TK.max() <= 63

    def test_a_function_of_token_layer_and_seed_alone(self):
        torch.manual_seed(5)
        ids_T = torch.randint(0, 8192, (500,))
        expert_ids_TK = self.route(ids_T)
        torch.manual_seed(6)
        assert torch.equal(self.route(ids_T.flip(0)), expert_ids_TK.flip(0)), "neither place nor neighbours matter"
        assert torch.equal(self.route(ids_T[17:18]), expert_ids_TK[17:18])
        others = [self.route(ids_T, seed=3), self.route(ids_T, layer=2), self.route(ids_T + 1)]
        for other_TK in others:
            same = (other_TK[:, :, None] == expert_ids_TK[:, None]).any(-1).float().mean().item()
            assert same == pytest.approx(4 / 64, abs=0.03), "as often as two independent draws agree"

    def test_experts_are_used_evenly_over_the_vocabulary(self):
        expert_ids_TK = self.route(torch.arange(8192))
        counts_E = torch.bincount(expert_ids_TK.flatten(), minlength=64).double()
        # Each is binomial with 8192 draws at 1/16: mean 512, deviation 22.
        chi_square = ((counts_E - 512) ** 2 / (512 * 15 / 16)).sum().item()
        assert (counts_E - 512).abs().max() < 5 * 22
        assert 63 - 4 * math.sqrt(2 * 63) < chi_square < 63 + 4 * math.sqrt(2 * 63)
        assert len({tuple(sorted(ids)) for ids in expert_ids_TK.tolist()}) > 8000, "not a few sets over and over"
        everyone = self.route([3, 4], config=SoMEConfig(num_experts=6, top_k=6, routing="hash", rules=FIXED))
        assert everyone.sort().values.tolist() == [list(range(6))] * 2

    def test_the_layer_averages_the_experts_of_each_token(self):
        layer = make_layer(routing="hash", top_k=3, expert_bias="torch")
        x_BSD, mask_BS = inputs().requires_grad_(), torch.ones(2, 9).bool()
        mask_BS[1, 6:] = False
        y_BSD, routing = layer(x_BSD, mask_BS, input_ids_BS=IDS_BS)
        expert_ids_TK = fixed_route(layer.config, IDS_BS[mask_BS], 2, 1)[1]
        assert torch.equal(routing.expert_ids_TK, expert_ids_TK) and (routing.gates_TK == torch.full((), 1 / 3)).all()
        experts = experts_of(layer.config)
        x_TD = x_BSD.detach()[mask_BS].double().requires_grad_()
        means = [
            sum(expert_output(x, experts(e)) for e in ids) / 3 for x, ids in zip(x_TD, expert_ids_TK.tolist(), strict=True)
        ]
        torch.testing.assert_close(y_BSD[mask_BS].double(), torch.stack(means), atol=1e-5, rtol=1e-5)
        assert not y_BSD[~mask_BS].any() and not list(layer.parameters())
        y_BSD.sum().backward()
        torch.stack(means).sum().backward()
        torch.testing.assert_close(x_BSD.grad[mask_BS].double(), x_TD.grad, atol=1e-5, rtol=1e-5)
        for changed in (
            layer(inputs(3), mask_BS, 9.0, input_ids_BS=IDS_BS),
            layer.eval()(x_BSD, mask_BS, input_ids_BS=IDS_BS),
        ):
            assert torch.equal(changed[1].expert_ids_TK, expert_ids_TK) and torch.equal(
                changed[1].gates_TK, routing.gates_TK
            )


@pytest.mark.parametrize("top_k", [1, 2])
def test_shared_experts_serve_everyone(top_k):
    layer = make_layer(routing="shared", top_k=top_k)
    x_BSD = inputs()
    y_BSD, routing = layer(x_BSD, input_ids_BS=IDS_BS)
    assert routing.expert_ids_TK.tolist() == [list(range(top_k))] * 18 and (routing.gates_TK == 1 / top_k).all()
    experts = experts_of(layer.config)
    for x_D, y_D in zip(x_BSD.double().flatten(0, 1), y_BSD.flatten(0, 1), strict=True):
        expected_D = sum(expert_output(x_D, experts(e)) for e in range(top_k)) / top_k
        torch.testing.assert_close(y_D.double(), expected_D, atol=1e-5, rtol=1e-5)


def test_experts_are_swapped_in_evaluation_alone():
    swapped, plain = make_layer(permute_in_evaluation=True), make_layer()
    x_BSD = inputs()
    trained, as_ever = swapped.train()(x_BSD), plain.train()(x_BSD)
    assert torch.equal(trained[0], as_ever[0])
    y_BSD, routing = swapped.eval()(x_BSD)
    _, y_TD, expert_ids_TK, gates_TK, _ = oracle(plain, x_BSD, lambda e: (e + 1) % 6)
    torch.testing.assert_close(y_BSD.view(18, 12).double(), y_TD, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(y_BSD, plain.eval()(x_BSD)[0], atol=1e-2)
    assert torch.equal(routing.expert_ids_TK, expert_ids_TK), "the record names who was chosen"
    torch.testing.assert_close(routing.gates_TK.double(), gates_TK, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["default", "sparse"])
@pytest.mark.parametrize("gain", [1.0, 0.25])
def test_biased_and_scaled_experts_against_the_specification(init, gain):
    layer = make_layer(expert_bias="torch", expert_gain=gain, expert_init=init)
    x_BSD = inputs()
    y_BSD, _ = layer(x_BSD)
    _, y_TD, *_ = oracle(layer, x_BSD)
    torch.testing.assert_close(y_BSD.view(18, 12).double(), y_TD, atol=1e-5, rtol=1e-5)
    unscaled = make_layer(expert_bias="torch", expert_init=init)
    torch.testing.assert_close(y_BSD, gain * unscaled(x_BSD)[0], atol=1e-6, rtol=1e-5)
    unbiased = make_layer(expert_gain=gain, expert_init=init)
    assert not torch.allclose(y_BSD, unbiased(x_BSD)[0], atol=0.01 * gain)


def test_values_of_biases_and_gain():
    sizes = dict(d_model=64, d_ffn=400, num_experts=8, top_k=2)
    plain, biased, louder = (
        FrozenExpertPool(SoMEConfig(**sizes, **changes), layer=1, seed=2)
        for changes in ({}, dict(expert_bias="torch"), dict(expert_bias="torch", expert_gain=3.0))
    )
    for name in ("w_down_eFD", "w_up_eDF"):
        assert torch.equal(getattr(biased, name), getattr(plain, name)), "biases change no matrix"
    assert not plain.b_down_eF.any() and not plain.b_up_eD.any()
    # As torch's linear layers draw them: uniform up to fan_in^-0.5, the fan-in of the layer that they belong to.
    for bias, fan_in in ((biased.b_down_eF, 64), (biased.b_up_eD, 400)):
        assert bias.abs().max() <= fan_in**-0.5
        assert bias.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)
        assert bias.mean().abs() < 0.1 * fan_in**-0.5
    assert torch.equal(louder.w_down_eFD, biased.w_down_eFD) and torch.equal(louder.b_down_eF, biased.b_down_eF)
    assert torch.equal(louder.w_up_eDF, 3 * biased.w_up_eDF) and torch.equal(louder.b_up_eD, 3 * biased.b_up_eD)


SHARDED = {
    "hash": dict(routing="hash", top_k=3),
    "shared": dict(routing="shared", top_k=1),
    "swapped": dict(permute_in_evaluation=True),
    "raw queries": dict(normalise_query=False, router="linear"),
    "frozen router": dict(train_router=False, expert_bias="torch", expert_gain=0.5),
}


def _on_two_ranks(rank: int) -> dict[str, tuple]:
    """Each rank's own row of the batch; in training with the gradient of its inputs, and in evaluation."""
    results = {}
    for name, changes in SHARDED.items():
        layer = make_layer(dist.group.WORLD, **changes)
        x_BSD = inputs()[rank : rank + 1].requires_grad_()
        y_BSD, routing = layer(x_BSD, input_ids_BS=IDS_BS[rank : rank + 1])
        y_BSD.square().sum().backward()
        evaluated_BSD = layer.eval()(x_BSD, input_ids_BS=IDS_BS[rank : rank + 1])[0]
        results[name] = y_BSD.detach(), x_BSD.grad, routing.expert_ids_TK, evaluated_BSD.detach(), len(layer.pool.expert_ids)
    return results


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, tuple]]:
    return run_ranks(_on_two_ranks, 2)


@pytest.mark.parametrize("name", SHARDED)
def test_two_ranks_compute_what_one_process_does(two_ranks, name):
    layer, x_BSD = make_layer(**SHARDED[name]), inputs().requires_grad_()
    y_BSD, routing = layer(x_BSD, input_ids_BS=IDS_BS)
    y_BSD.square().sum().backward()
    evaluated_BSD = layer.eval()(x_BSD, input_ids_BS=IDS_BS)[0]
    for rank, of_rank in enumerate(two_ranks):
        ours_BSD, grad_BSD, expert_ids_TK, ours_evaluated_BSD, held = of_rank[name]
        assert held == 3 and torch.equal(expert_ids_TK, routing.expert_ids_TK.view(2, 9, -1)[rank])
        pairs = [(ours_BSD, y_BSD), (grad_BSD, x_BSD.grad), (ours_evaluated_BSD, evaluated_BSD)]
        for ours, theirs in pairs:
            torch.testing.assert_close(ours[0], theirs[rank], atol=1e-5, rtol=1e-5)


def test_learned_gains_scale_what_an_expert_puts_out():
    layer, plain = make_layer(learned_gain=True), make_layer()
    x_BSD = inputs()
    torch.testing.assert_close(layer(x_BSD)[0], plain(x_BSD)[0])
    with torch.no_grad():
        layer.gain_E.copy_(torch.arange(1.0, 7.0))
    y_BSD, routing = layer(x_BSD)
    experts = experts_of(layer.config)
    for x_D, y_D, ids, gates in zip(
        x_BSD.double().flatten(0, 1), y_BSD.flatten(0, 1), routing.expert_ids_TK, routing.gates_TK, strict=True
    ):
        terms = [g * (e + 1) * expert_output(x_D, experts(e)) for g, e in zip(gates.tolist(), ids.tolist(), strict=True)]
        torch.testing.assert_close(y_D.double(), sum(terms), atol=1e-5, rtol=1e-5)
    y_BSD.square().sum().backward()
    assert layer.gain_E.grad[routing.expert_ids_TK.unique()].all()


def test_normalised_queries_and_their_gradient():
    x = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_Normalise.apply, (x,))
    single = x.detach().float()
    assert torch.equal(_Normalise.apply(single), F.normalize(single, dim=-1, eps=1e-12))
    assert _Normalise.apply(torch.zeros(2, 4)).equal(torch.zeros(2, 4))
