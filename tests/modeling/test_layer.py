"""One SoME layer in one process: against the specification's loops over tokens, with and without padding."""

import pytest
import torch

from modeling.some import SoMEConfig, SoMELayer
from tests.oracles.layer import some_layer_per_token


def make_layer(**changes) -> SoMELayer:
    config = SoMEConfig(**{"d_model": 12, "num_experts": 6, "d_ffn": 20, "top_k": 2, "temperature": 0.7, **changes})
    torch.manual_seed(0)
    return SoMELayer(config, layer=1, seed=2)


def oracle(layer: SoMELayer, x_TD: torch.Tensor, temperature: float):
    """Outputs and gradients of sum(output * weight) in float64."""
    linears = [m for m in layer.query if isinstance(m, torch.nn.Linear)]
    weights = [(m.weight.detach().double().requires_grad_(), m.bias.detach().double().requires_grad_()) for m in linears]
    whole = SoMELayer(layer.config, layer=1, seed=2).pool
    buffers = (whole.w_down_eFD, whole.b_down_eF, whole.w_up_eDF, whole.b_up_eD)
    x_TD = x_TD.detach().double().requires_grad_()
    y_TD, expert_ids_TK, gates_TK = some_layer_per_token(
        x_TD, weights, layer.store.keys, lambda e: tuple(b[e].double() for b in buffers), layer.config.top_k, temperature
    )
    return x_TD, y_TD, expert_ids_TK, gates_TK, weights


def query_gradients(layer: SoMELayer) -> list[torch.Tensor]:
    linears = [m for m in layer.query if isinstance(m, torch.nn.Linear)]
    return [g for m in linears for g in (m.weight.grad, m.bias.grad)]


@pytest.mark.parametrize("router", ["linear", "mlp"])
@pytest.mark.parametrize("top_k", [1, 2, 6])
@pytest.mark.parametrize("init", ["default", "orthogonal"])
def test_layer_equals_the_specification(router, top_k, init):
    layer = make_layer(router=router, top_k=top_k, expert_init=init)
    x_BSD = torch.randn(2, 9, 12, requires_grad=True)
    weight_TD = torch.randn(18, 12)
    y_BSD, routing = layer(x_BSD)
    (y_BSD.view(18, 12) * weight_TD).sum().backward()

    x_TD, y_TD, expert_ids_TK, gates_TK, weights = oracle(layer, x_BSD.view(18, 12), 0.7)
    (y_TD * weight_TD).sum().backward()
    assert torch.equal(routing.expert_ids_TK, expert_ids_TK)
    for ours, theirs in [
        (routing.gates_TK, gates_TK),
        (y_BSD.view(18, 12), y_TD),
        (x_BSD.grad.view(18, 12), x_TD.grad),
        *zip(query_gradients(layer), [p.grad for pair in weights for p in pair], strict=True),
    ]:
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    if top_k == 1:
        assert all(g.abs().max() < 1e-7 for g in query_gradients(layer)), "a constant gate teaches the query nothing"


def test_padding_is_not_routed_and_changes_nothing():
    layer = make_layer()
    x_BSD, mask_BS = torch.randn(3, 5, 12), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    y_BSD, routing = layer(x_BSD, mask_BS)
    assert routing.queries_TD.shape[0] == 7 and not y_BSD[mask_BS == 0].any()
    alone_BSD, _ = layer(x_BSD[1:2, :2])
    torch.testing.assert_close(y_BSD[1:2, :2], alone_BSD)
    x_BSD[mask_BS == 0] = 1e6
    torch.testing.assert_close(layer(x_BSD, mask_BS)[0], y_BSD)


def test_only_padding_gives_zeros_and_a_gradient():
    layer = make_layer()
    x_BSD = torch.randn(2, 3, 12, requires_grad=True)
    y_BSD, routing = layer(x_BSD, torch.zeros(2, 3))
    y_BSD.sum().backward()
    assert not y_BSD.any() and not x_BSD.grad.any() and len(routing.expert_ids_TK) == 0


def test_temperature_of_training_evaluation_and_call():
    layer = make_layer(eval_temperature=0.1)
    x_BSD = torch.randn(1, 7, 12)
    sharp = {
        "train": layer.train()(x_BSD)[1].gates_TK,
        "eval": layer.eval()(x_BSD)[1].gates_TK,
        "call": layer(x_BSD, temperature=5.0)[1].gates_TK,
    }
    for name, temperature in {"train": 0.7, "eval": 0.1, "call": 5.0}.items():
        *_, gates_TK, _ = oracle(layer, x_BSD[0], temperature)
        torch.testing.assert_close(sharp[name].double(), gates_TK, atol=1e-5, rtol=1e-5)


def test_routing_record_is_detached_and_measures_the_output():
    layer = make_layer()
    x_BSD = torch.randn(1, 7, 12, requires_grad=True)
    y_BSD, routing = layer(x_BSD, residual_BSD=2 * x_BSD)
    assert not routing.queries_TD.requires_grad and not routing.gates_TK.requires_grad
    torch.testing.assert_close(routing.output_squares_T, y_BSD[0].detach().square().sum(-1))
    torch.testing.assert_close(routing.residual_squares_T, 4 * x_BSD[0].detach().square().sum(-1))
    torch.testing.assert_close(routing.queries_TD.norm(dim=-1), torch.ones(7))
