"""The whole model against a slow forward written from the specification."""

import math

import pytest
import torch

from modeling import ModelConfig, SoMEConfig, build_model
from tests.oracles.layer import some_layer_per_token
from tests.oracles.transformer import transformer_per_position


def tiny(**changes) -> ModelConfig:
    some = SoMEConfig(num_experts=5, d_ffn=12, top_k=2, temperature=0.7)
    sizes = dict(vocab_size=30, d_model=8, num_layers=2, num_heads=2, max_seq_len=12, some=some)
    return ModelConfig(**{**sizes, **changes})


def oracle_logits(model, ids_S):
    config = model.config
    layers, mixers = [], []
    for block in model.blocks:
        layers.append(
            {
                "attn_in_weight": block.attention.qkv.weight,
                "attn_in_bias": block.attention.qkv.bias,
                "attn_out_weight": block.attention.out.weight,
                "attn_out_bias": block.attention.out.bias,
                "norm1_weight": block.attention_norm.weight,
                "norm1_bias": block.attention_norm.bias,
                "norm2_weight": block.mixer_norm.weight,
                "norm2_bias": block.mixer_norm.bias,
            }
        )
        mixers.append(lambda h_SD, some=block.mixer.some: mix(some, h_SD))
    tensors = {
        "embedding_VD": model.embedding.weight,
        "head_weight_VD": model.head.weight,
        "head_bias_V": model.head.bias,
        "layers": layers,
    }
    return transformer_per_position(
        ids_S, tensors, mixers, config.num_heads, norm_position=config.norm_position, causal=config.causal
    )


def mix(some, h_SD):
    pool = some.pool
    weights = [(m.weight.double(), m.bias.double()) for m in some.query if isinstance(m, torch.nn.Linear)]
    experts = lambda e: tuple(b[e].double() for b in (pool.w_down_eFD, pool.b_down_eF, pool.w_up_eDF, pool.b_up_eD))  # noqa: E731
    return some_layer_per_token(h_SD, weights, some.store.keys, experts, some.config.top_k, 0.7)[0]


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("embedding_init", ["scaled", "unit"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "sees all"])
def test_logits_equal_the_specification(norm_position, embedding_init, causal):
    model = build_model(tiny(norm_position=norm_position, embedding_init=embedding_init, causal=causal), seed=3)
    for parameter in model.parameters():  # biases and norms start trivial: make them count
        torch.nn.init.normal_(parameter, std=0.3)
    ids_S = torch.randint(0, 30, (9,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits_SV = model(ids_S[None]).logits[0]
        torch.testing.assert_close(logits_SV.double(), oracle_logits(model, ids_S), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("init", "std"), [("scaled", 64**-0.5), ("unit", 1.0)])
def test_embedding_init(init, std):
    model = build_model(tiny(vocab_size=2000, d_model=64, embedding_init=init))
    assert model.embedding.weight.std().item() == pytest.approx(std, rel=0.02)


def test_no_position_sees_the_future():
    model = build_model(tiny())
    ids_BS = torch.randint(0, 30, (1, 10))
    changed_BS = ids_BS.clone()
    changed_BS[0, 6] = (ids_BS[0, 6] + 1) % 30
    before, after = model(ids_BS).logits, model(changed_BS).logits
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any(-1).all()


def test_without_the_causal_mask_every_position_sees_the_future():
    """The published v1.1: the token to be predicted is in sight (specs F0)."""
    model = build_model(tiny(causal=False))
    ids_BS = torch.randint(0, 30, (1, 10), generator=torch.Generator().manual_seed(0))
    changed_BS = ids_BS.clone()
    changed_BS[0, 9] = (ids_BS[0, 9] + 1) % 30
    difference_S = (model(ids_BS).logits - model(changed_BS).logits)[0].abs().amax(-1)
    assert (difference_S > 1e-4).all(), "also far above what rounding may change"
    gradient_SD = torch.autograd.grad(model(ids_BS).logits[0, 0].sum(), model.embedding.weight)[0][ids_BS[0]]
    assert (gradient_SD.abs().amax(-1) > 0).all(), "the first position reads every position"


def test_padding_changes_no_real_position():
    model = build_model(tiny())
    ids_BS, mask_BS = torch.randint(0, 30, (2, 10)), torch.ones(2, 10)
    mask_BS[1, 6:] = 0
    padded = model(ids_BS, mask_BS).logits
    torch.testing.assert_close(padded[1:, :6], model(ids_BS[1:, :6]).logits)


def test_losses_are_the_cross_entropy_of_the_targets():
    model = build_model(tiny())
    ids_BS, targets_BS = torch.randint(0, 30, (2, 5)), torch.tensor([[3, 4, -100, -100, -100], [1, 2, 3, 4, 5]])
    log_probabilities = model(ids_BS).logits.log_softmax(-1)
    expected = [-log_probabilities[b, s, targets_BS[b, s]] for b in range(2) for s in range(5) if targets_BS[b, s] >= 0]
    torch.testing.assert_close(model(ids_BS, targets_BS=targets_BS).losses_T, torch.stack(expected))


def test_first_loss_is_near_that_of_a_uniform_guess():
    model = build_model(tiny(vocab_size=1000, d_model=64))
    ids_BS = torch.randint(0, 1000, (8, 12))
    loss = model(ids_BS, targets_BS=ids_BS.roll(-1, 1)).losses_T.mean().item()
    assert loss == pytest.approx(math.log(1000), abs=0.5)


def test_same_seed_same_model_and_the_global_generator_is_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = build_model(tiny(), seed=1)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(8)
    for (name, a), b in zip(first.state_dict().items(), build_model(tiny(), seed=1).state_dict().values(), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), name
    other = build_model(tiny(), seed=2)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    assert not torch.equal(first.some_layers[0].store.keys, other.some_layers[0].store.keys)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [((1, 13), None, "13 tokens is longer than model.max_seq_len = 12"), ((1, 3), [[0, 1, 1]], "pad on the right")],
)
def test_refused_inputs(ids, mask, message):
    model = build_model(tiny())
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(ids, dtype=torch.int64), None if mask is None else torch.tensor(mask))
