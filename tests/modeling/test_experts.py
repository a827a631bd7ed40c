"""The frozen pool: values, purity, compute and gradients."""

import math

import pytest
import torch

from modeling.some import FrozenExpertPool, SoMEConfig, pool_manifest
from modeling.some.experts import expert_weights

CONFIG = SoMEConfig(d_model=16, num_experts=6, d_ffn=24, top_k=2)


def test_weights_depend_on_nothing_but_their_arguments():
    whole = FrozenExpertPool(CONFIG, layer=3, seed=5)
    torch.manual_seed(123)
    for experts in ([4, 1], [5], [0, 1, 2, 3, 4, 5], []):
        shard = FrozenExpertPool(CONFIG, layer=3, seed=5, expert_ids=experts)
        for name, buffer in shard.named_buffers():
            assert torch.equal(buffer, getattr(whole, name)[experts]), name


@pytest.mark.parametrize("init", ["default", "orthogonal", "sparse"])
def test_weights_do_not_depend_on_the_number_of_threads(init):
    config = SoMEConfig(d_model=256, num_experts=2, d_ffn=512, top_k=2, expert_init=init)
    threads, hashes = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            hashes.add((FrozenExpertPool(config).content_hash(), pool_manifest(config, 2, seed=0)["sample_sha256"]))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert len(hashes) == 1


@pytest.mark.parametrize("changed", [dict(seed=6), dict(layer=4), dict(expert_ids=[1])])
def test_weights_depend_on_each_argument(changed):
    pools = [FrozenExpertPool(CONFIG, **{"layer": 3, "seed": 5, "expert_ids": [0], **c}) for c in ({}, changed)]
    assert not torch.equal(pools[0].w_down_eFD, pools[1].w_down_eFD)
    assert not torch.equal(pools[0].w_up_eDF, pools[1].w_up_eDF)


def test_bf16_is_the_rounded_fp32_pool():
    fp32, bf16 = FrozenExpertPool(CONFIG), FrozenExpertPool(CONFIG, dtype=torch.bfloat16)
    for name, buffer in bf16.named_buffers():
        assert buffer.dtype == torch.bfloat16
        assert torch.equal(buffer, getattr(fp32, name).bfloat16())


def test_default_init_is_uniform_by_fan_in():
    down, up = expert_weights(SoMEConfig(d_model=64, d_ffn=256), 0, 0, 0)[:2]
    for weight, fan_in in ((down, 64), (up, 256)):
        assert weight.abs().max() <= 1 / math.sqrt(fan_in)
        assert weight.std() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.02)


def test_orthogonal_init_has_orthonormal_columns_or_rows():
    down, up = expert_weights(SoMEConfig(d_model=16, d_ffn=40, expert_init="orthogonal"), 0, 0, 0)[:2]
    torch.testing.assert_close(down.T @ down, torch.eye(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(up @ up.T, torch.eye(16), atol=1e-5, rtol=0)


def test_sparse_init_zeroes_half_of_every_column():
    for weight in expert_weights(SoMEConfig(d_model=15, d_ffn=101, expert_init="sparse"), 0, 0, 0)[:2]:
        zeros = (weight == 0).sum(dim=0)
        assert (zeros == math.ceil(weight.shape[0] / 2)).all()
        assert weight[weight != 0].std() == pytest.approx(0.01, rel=0.1)


def test_biases_are_zero_and_nothing_is_a_parameter_or_saved():
    pool = FrozenExpertPool(CONFIG)
    assert not pool.b_down_eF.any() and not pool.b_up_eD.any()
    assert not list(pool.parameters()) and not pool.state_dict()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_outputs_and_gradients_equal_the_reference(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    pool = FrozenExpertPool(CONFIG, dtype=dtype)
    for bias in (pool.b_down_eF, pool.b_up_eD):
        bias.normal_(generator=generator)  # other inits have biases: they must be right too
    rows = [10, 0, 33, 7, 0, 1]
    tokens_R = torch.cat([torch.randperm(40, generator=generator)[:r] for r in rows])
    weight_TD = torch.randn(40, 16, generator=generator).to(dtype)
    results = []
    for compute in (pool.forward, pool.reference):
        inputs = torch.Generator().manual_seed(1)
        x_TD = torch.randn(40, 16, generator=inputs).to(dtype).requires_grad_()
        gates_R = torch.rand(len(tokens_R), generator=inputs).requires_grad_()
        y_TD = compute(x_TD, gates_R, tokens_R, rows)
        (y_TD * weight_TD).sum().backward()
        results.append((y_TD, x_TD.grad, gates_R.grad))
    for ours, reference in zip(*results, strict=True):
        assert ours.dtype == reference.dtype
        scale = reference.abs().max().item()
        torch.testing.assert_close(ours, reference, atol=tolerance * scale, rtol=0)


def test_nothing_but_preactivations_is_kept_for_the_backward():
    pool = FrozenExpertPool(CONFIG)
    x_TD = torch.randn(40, 16, requires_grad=True)
    tokens_R = torch.arange(40)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        pool(x_TD, torch.rand(40, requires_grad=True), tokens_R, [40, 0, 0, 0, 0, 0])
    pool_storages = {buffer.data_ptr() for buffer in pool.buffers()}
    own = [t for t in kept if t.data_ptr() not in pool_storages]
    assert sorted(t.numel() for t in own) == [40, 40, 40 * CONFIG.d_ffn], "gates, token indices, h"


def test_no_rows_at_all():
    pool = FrozenExpertPool(CONFIG)
    x_TD = torch.randn(0, 16, requires_grad=True)
    y_TD = pool(x_TD, torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.int64), [0] * 6)
    y_TD.sum().backward()
    assert y_TD.shape == x_TD.grad.shape == (0, 16)


def test_manifest_tells_pools_apart():
    manifest = pool_manifest(CONFIG, 2, seed=0)
    assert manifest == pool_manifest(CONFIG, 2, seed=0)
    assert manifest["sample_sha256"] != pool_manifest(CONFIG, 2, seed=1)["sample_sha256"]
    sparse = SoMEConfig(d_model=16, num_experts=6, d_ffn=24, top_k=2, expert_init="sparse")
    assert manifest["sample_sha256"] != pool_manifest(sparse, 2, seed=0)["sample_sha256"]
