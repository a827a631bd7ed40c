"""What may stand where the SoME layer stands: outputs, gradients, counts and FLOPs of every channel mixer."""

from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling import KeyRules, ModelConfig, SoMEConfig, build_model
from modeling.mixers import ChannelMixer, frozen_manifest
from modeling.some.weights import expert_weights
from tests.oracles.layer import some_layer_per_token
from tests.oracles.mixers import mix_per_token

KINDS = ("some", "dense", "frozen_dense", "none")
FIXED = KeyRules.preset("fixed")


def tiny(kind: str = "some", some: dict | None = None, **changes) -> ModelConfig:
    sizes = dict(vocab_size=30, d_model=8, num_layers=2, num_heads=2, max_seq_len=12, channel_mixer=kind)
    width = dict(d_ffn=20) if kind in ("dense", "frozen_dense") else {}
    some_config = SoMEConfig(**{"num_experts": 5, "d_ffn": 12, "top_k": 2, "temperature": 0.7, **(some or {})})
    return ModelConfig(**{**sizes, **width, **changes}, some=some_config)


def double(linear: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(p.detach().double().requires_grad_(p.requires_grad) for p in (linear.weight, linear.bias))


def oracle(kind: str, mixer: ChannelMixer, x_TD: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The specification's output and copies of the trained parameters, by name, that it depends on; in float64."""
    linears = {name: double(m) for name, m in mixer.named_modules() if isinstance(m, torch.nn.Linear)}
    some = ffn = None
    if kind == "some":
        layer, pool = mixer.some, mixer.some.pool
        query = [pair for name, pair in linears.items() if "query" in name]
        buffers = (pool.w_down_eFD, pool.b_down_eF, pool.w_up_eDF, pool.b_up_eD)
        experts = lambda e: tuple(b[e].double() for b in buffers)  # noqa: E731
        some = lambda x: some_layer_per_token(x, query, layer.store.keys, experts, 2, 0.7)[0]  # noqa: E731
    elif kind == "dense":
        ffn = (*linears["dense.0"], *linears["dense.2"])
    elif kind == "frozen_dense":
        pool = mixer.frozen
        ffn = tuple(b[0].double() for b in (pool.w_down_eFD, pool.b_down_eF, pool.w_up_eDF, pool.b_up_eD))
    extra = {name: linears.get(name) for name in ("input_map", "readout")}
    y_TD = mix_per_token(x_TD, kind, some=some, ffn=ffn, **extra)
    parts = {name: zip(("weight", "bias"), pair, strict=True) for name, pair in linears.items()}
    return y_TD, {f"{name}.{part}": tensor for name, pair in parts.items() for part, tensor in pair}


@pytest.mark.parametrize("readout", [False, True], ids=["plain", "readout"])
@pytest.mark.parametrize("input_map", [False, True], ids=["direct", "input map"])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_equal_the_specification(kind, input_map, readout):
    if kind == "none" and input_map and not readout:
        with pytest.raises(ValueError, match="model.input_map = True feeds nothing"):
            tiny(kind, input_map=True)
        return
    config = tiny(kind, some=dict(expert_bias="torch"), input_map=input_map, readout=readout)
    mixer = build_model(config, seed=3).blocks[1].mixer
    generator = torch.Generator().manual_seed(1)
    for parameter in mixer.parameters():  # the readout starts at zero: make it count
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    x_BSD = torch.randn(2, 5, 8, generator=generator, requires_grad=True)
    weight_TD = torch.randn(10, 8, generator=generator)
    y_BSD, routing = mixer(x_BSD, x_BSD, None, None, torch.zeros(2, 5, dtype=torch.int64))
    assert (routing is None) == (kind != "some")

    x_TD = x_BSD.detach().double().view(10, 8).requires_grad_()
    y_TD, parameters = oracle(kind, mixer, x_TD)
    torch.testing.assert_close(y_BSD.view(10, 8).double(), y_TD, atol=1e-5, rtol=1e-5)
    if kind == "none" and not readout:
        assert not y_BSD.any()
        return
    assert y_BSD.abs().mean() > 1e-2
    (y_BSD.view(10, 8) * weight_TD).sum().backward()
    (y_TD * weight_TD).sum().backward()
    ours = {"x": x_BSD.grad.view(10, 8), **{name: p.grad for name, p in mixer.named_parameters()}}
    theirs = {"x": x_TD.grad, **{name: p.grad for name, p in parameters.items()}}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name].double(), gradient, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: n + m)


def test_frozen_dense_is_one_random_ffn_that_nothing_trains_or_saves():
    config = tiny("frozen_dense", some=dict(expert_gain=2.0, expert_init="orthogonal"))
    model = build_model(config, seed=3, pool_dtype=torch.bfloat16)
    for layer, block in enumerate(model.blocks):
        pool, drawn = block.mixer.frozen, expert_weights(SoMEConfig(d_model=8, d_ffn=20, expert_gain=2.0,
                                                                    expert_init="orthogonal"), 3, layer, 0)  # fmt: skip
        for held, expected in zip((pool.w_down_eFD, pool.w_up_eDF, pool.b_down_eF, pool.b_up_eD), drawn, strict=True):
            assert held.shape[0] == 1 and torch.equal(held[0], expected.bfloat16())
            assert not held.requires_grad
        assert not list(block.mixer.parameters()) and not block.mixer.state_dict()
    assert not torch.equal(model.blocks[0].mixer.frozen.w_up_eDF, model.blocks[1].mixer.frozen.w_up_eDF)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_readout_starts_by_adding_nothing_and_learns(kind, norm_position):
    model = build_model(tiny(kind, readout=True, norm_position=norm_position), seed=3)
    block = model.blocks[0]
    x_BSD = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    ids_BS = torch.zeros(2, 5, dtype=torch.int64)
    y_BSD, _ = block(x_BSD, None, None, ids_BS)
    if norm_position == "pre":
        expected = x_BSD + block.attention(block.attention_norm(x_BSD))
    else:
        expected = block.mixer_norm(block.attention_norm(x_BSD + block.attention(x_BSD)))
    assert torch.equal(y_BSD, expected)
    weight = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    (y_BSD * weight).sum().backward()
    for parameter in block.mixer.readout.parameters():
        assert parameter.grad.abs().min() > 0


def test_models_differ_in_their_mixers_alone():
    """With a readout, which starts at nothing, they even compute the same."""
    models = [build_model(tiny(kind, readout=True, input_map=kind == "some"), seed=3) for kind in KINDS]
    models.append(build_model(tiny("some", readout=True, some=dict(router="linear", top_k=1, num_experts=9)), seed=3))
    ids_BS = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    first, *others = models
    cores = [{n: p for n, p in m.named_parameters() if ".mixer." not in n} for m in models]
    for model, core in zip(others, cores[1:], strict=True):
        assert core.keys() == cores[0].keys()
        for name, parameter in core.items():
            assert torch.equal(parameter, cores[0][name]), name
        assert torch.equal(model(ids_BS).logits, first(ids_BS).logits)


def test_a_readout_leaves_the_random_size_of_experts_behind():
    outputs = []
    for gain in (1.0, 10.0):
        mixer = build_model(tiny(readout=True, some=dict(expert_gain=gain, num_experts=3, d_ffn=64))).blocks[0].mixer
        torch.nn.init.normal_(mixer.readout.weight, generator=torch.Generator().manual_seed(0))
        x_BSD = 100 * torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))  # far above the norm's epsilon
        outputs.append(mixer(x_BSD, x_BSD, None, None, torch.zeros(1, 6, dtype=torch.int64))[0])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("readout", [False, True], ids=["plain", "readout"])
def test_the_routing_record_measures_what_is_added_at_real_tokens(readout):
    mixer = build_model(tiny(readout=readout)).blocks[0].mixer
    if readout:
        torch.nn.init.normal_(mixer.readout.weight, generator=torch.Generator().manual_seed(0))
        torch.nn.init.ones_(mixer.readout.bias)
    x_BSD = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    mask_BS = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    y_BSD, routing = mixer(x_BSD, 3 * x_BSD, mask_BS, None, torch.zeros(2, 4, dtype=torch.int64))
    torch.testing.assert_close(routing.output_squares_T, y_BSD[mask_BS].square().sum(-1))
    torch.testing.assert_close(routing.residual_squares_T, 9 * x_BSD[mask_BS].square().sum(-1))
    assert len(routing.expert_ids_TK) == 4 and not routing.output_squares_T.requires_grad


EXTRAS = list(product([False, True], repeat=2))
SOMES = [
    dict(router=router, train_router=train, expert_bias=bias, normalise_query=train)
    for router, train, bias in product(["linear", "mlp"], [True, False], ["zero", "torch"])
] + [dict(routing=routing, rules=FIXED, train_router=train) for routing in ("hash", "shared") for train in (True, False)]


@pytest.mark.parametrize(
    "config",
    [tiny(kind, input_map=i, readout=r) for kind, (i, r) in product(KINDS, EXTRAS) if kind != "none" or r or not i]
    + [tiny(some=some, input_map=i, readout=r) for some, (i, r) in product(SOMES, EXTRAS[::3])]
    + [
        tiny(some=dict(router_mult=0.7)),
        tiny(some=dict(learned_gain=True)),
        tiny("dense", norm_position="post", causal=False),
    ],
    ids=lambda c: f"{c.channel_mixer} {c.some.routing} {c.some.router} {c.input_map:d}{c.readout:d}",
)
def test_counts_equal_the_built_model(config):
    counts, model = config.num_parameters(), build_model(config)
    pools = [b.mixer.some.pool if b.mixer.some else b.mixer.frozen for b in model.blocks]
    in_pools = sum(buffer.numel() for pool in pools if pool is not None for buffer in pool.buffers())
    assert counts.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts.frozen == in_pools + sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert counts.total == counts.trainable + counts.frozen


@pytest.mark.parametrize(
    "config",
    # Without a mixer and a readout nothing reads an input map.
    [tiny(kind, input_map=i, readout=r) for kind, (i, r) in product(KINDS, EXTRAS) if (kind, i, r) != ("none", True, False)]
    + [tiny(some=some, readout=True) for some in SOMES],
    ids=lambda c: f"{c.channel_mixer} {c.some.routing} {c.some.router} {c.some.train_router} {c.input_map:d}{c.readout:d}",
)
def test_flops_are_those_of_the_products_that_torch_runs(config):
    """Attention apart, which no counter sees on CPUs: a context of 0 leaves it out of the formula."""
    model = build_model(config)
    if config.readout:
        for block in model.blocks:
            torch.nn.init.ones_(block.mixer.readout.weight)
    ids_BS = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counted:
        model(ids_BS, targets_BS=ids_BS).losses_T.sum().backward()
    assert counted.get_total_flops() / 14 == config.num_flops_per_token(0)


def test_flops_of_attention_and_of_frozen_weights():
    base = tiny()
    assert base.num_flops_per_token(10) - base.num_flops_per_token(0) == 6 * 2 * 10 * 8
    both_ways = tiny(causal=False)
    assert both_ways.num_flops_per_token(10) - both_ways.num_flops_per_token(0) == 2 * 6 * 2 * 10 * 8
    dense, frozen = (tiny(kind).num_flops_per_token(5) for kind in ("dense", "frozen_dense"))
    assert dense - frozen == 2 * 2 * (2 * 8 * 20), "two layers, one product less for each of two weights"


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_values_get_no_gradient_and_stay(kind):
    model = build_model(tiny(kind, some=dict(train_router=False), input_map=True, readout=True), seed=1)
    for block in model.blocks:
        torch.nn.init.normal_(block.mixer.readout.weight, generator=torch.Generator().manual_seed(2))
    frozen = {n: t.clone() for n, t in [*model.named_parameters(), *model.named_buffers()] if not t.requires_grad}
    ids_BS = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(ids_BS, targets_BS=ids_BS).losses_T.mean().backward()
    optimizer.step()
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert {name.split(".")[-1] for name in frozen} > ({"w_up_eDF"} if "frozen" in kind or kind == "some" else set())
    for name, tensor in frozen.items():
        assert after[name].grad is None and torch.equal(after[name], tensor), name
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_manifest_identifies_what_is_frozen():
    assert frozen_manifest(tiny("dense"), 0) == frozen_manifest(tiny("none"), 0) == {}
    manifests = [frozen_manifest(tiny(kind), seed) for kind in ("some", "frozen_dense") for seed in (0, 1)]
    assert len({manifest["sample_sha256"] for manifest in manifests}) == 4
    assert frozen_manifest(tiny(some=dict(expert_bias="torch")), 0) != manifests[0]
    assert (manifests[2]["num_experts"], manifests[2]["d_ffn"]) == (1, 20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kind="conv"), "model.channel_mixer = 'conv' is not one of: some, dense, frozen_dense, none"),
        (dict(kind="dense", d_ffn=None), "model.d_ffn = None, but model.channel_mixer = dense needs its hidden width"),
        (dict(kind="frozen_dense", d_ffn=0), "model.d_ffn = 0, but model.channel_mixer = frozen_dense needs"),
        (dict(kind="some", d_ffn=20), "model.d_ffn = 20 has no effect with model.channel_mixer = some; leave it out"),
        (dict(kind="none", d_ffn=-3), "model.d_ffn = -3 has no effect with model.channel_mixer = none"),
        (dict(some=dict(routing="random")), "model.some.routing = 'random' is not one of: learned, hash, shared"),
        (dict(some=dict(routing="hash")), "model.some.routing = hash has no queries to move keys by; set .*preset = fixed"),
        (dict(some=dict(router_init="zero")), "model.some.router_init = 'zero'"),
        (dict(some=dict(expert_bias="normal")), "model.some.expert_bias = 'normal'"),
        (dict(some=dict(expert_gain=0.0)), "model.some.expert_gain = 0.0 must be greater than 0"),
    ],
)
def test_refusals_name_key_value_and_cure(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
