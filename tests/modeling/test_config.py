"""Counts and refusals of the model's configuration."""

import pytest

from modeling import KeyRules, ModelConfig, SoMEConfig, build_model
from tests.oracles.counts import count_parameters

PUBLISHED = {64: 701_496_320, 128: 1_373_568_000, 256: 2_717_711_360, 512: 5_405_998_080}


@pytest.mark.parametrize("num_experts", PUBLISHED)
def test_published_sizes(num_experts):
    counts = ModelConfig(some=SoMEConfig(num_experts=num_experts)).num_parameters()
    assert (counts.total, counts.trainable) == (PUBLISHED[num_experts], 29_424_640)
    assert counts.frozen == counts.total - counts.trainable


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_counts_equal_the_oracle_and_the_built_model(router, norm_position):
    some = SoMEConfig(num_experts=6, d_ffn=24, top_k=2, router=router, router_mult=1.5)
    config = ModelConfig(vocab_size=50, d_model=16, num_layers=3, num_heads=2, norm_position=norm_position, some=some)
    counts = config.num_parameters()
    assert (counts.total, counts.trainable) == count_parameters(50, 16, 3, 6, 24, router, router_hidden=24)
    model = build_model(config)
    assert counts.trainable == sum(p.numel() for p in model.parameters())
    assert counts.frozen == sum(b.numel() for layer in model.some_layers for b in layer.pool.buffers())


def test_flops_of_matrix_products():
    """Against a count of every product, forward plus the backward products that are really computed."""
    config = ModelConfig(
        vocab_size=50, d_model=16, num_layers=2, num_heads=2, some=SoMEConfig(num_experts=6, d_ffn=24, top_k=2)
    )
    S, D, H, E = 8, 16, 32, 6
    trained = 50 * D + 2 * (D * 3 * D + D * D + D * H + H * D)
    frozen = 2 * 2 * (D * 24 + 24 * D)
    scores = 2 * E * D  # the backward sums chosen keys, which is no product
    attention = 2 * 2 * 2 * S * D * 3 / 2  # two products of 2*S*D FLOPs a layer; backward twice; causal half
    assert config.num_flops_per_token(S) == 2 * trained * 3 + 2 * frozen * 2 + 2 * scores + attention


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: SoMEConfig(top_k=65), "top_k = 65"),
        (lambda: SoMEConfig(num_experts=0), "num_experts = 0"),
        (lambda: SoMEConfig(router="conv"), "router = 'conv'"),
        (lambda: SoMEConfig(expert_init="zeros"), "expert_init = 'zeros'"),
        (lambda: ModelConfig(num_heads=7), "num_heads = 7"),
        (lambda: ModelConfig(norm_position="both"), "norm_position = 'both'"),
        (lambda: KeyRules.preset("v99"), "'v99'"),
        (lambda: KeyRules(ema_decay=1.5), "ema_decay = 1.5"),
        (lambda: KeyRules(alpha=-1), "alpha = -1"),
    ],
)
def test_refusals_name_key_and_value(build, key):
    with pytest.raises(ValueError, match=key):
        build()
