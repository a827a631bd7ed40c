"""The frozen pool: values, purity, compute and gradients."""

import math
from dataclasses import replace

import pytest
import torch

from modeling.some import FrozenExpertPool, SoMEConfig, experts_simd, pool_manifest
from modeling.some.experts_amx import why_not_amx
from modeling.some.experts_simd import why_not_simd
from modeling.some.native import load_library
from modeling.some.weights import expert_weights, grids, scales
from tests.modeling.expert_pools import WIDE, check_against_float64, check_threads, make_pool, make_slots

CONFIG = SoMEConfig(d_model=16, num_experts=6, d_ffn=24, top_k=2)
COMPUTING = [(kernel, torch.bfloat16) for kernel in ("loop", "amx", "grouped")] + [("simd", torch.float32)]
"""Kernels, and a dtype in which each computes."""


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


@pytest.mark.parametrize(("d_model", "d_ffn", "gain"), [(512, 1024, 1.0), (64, 96, 0.3), (100, 37, 16.0)])
def test_weights_on_a_grid_are_whole_numbers_with_the_variance_of_the_default_init(d_model, d_ffn, gain):
    config = SoMEConfig(d_model=d_model, d_ffn=d_ffn, num_experts=3, top_k=1, expert_gain=gain, expert_grid="int8")
    plain = replace(config, expert_grid="none")
    for (most, scale), weight, usual in zip(
        grids(config), *(expert_weights(c, 0, 0, 0)[:2] for c in (config, plain)), strict=True
    ):
        whole = weight / scale
        assert math.log2(scale) == round(math.log2(scale)) and whole.equal(whole.round())
        assert 63 <= most <= 127 and whole.min() == -most and whole.max() == most
        assert weight.std().item() == pytest.approx(usual.std().item(), rel=0.03)
        assert most * (most + 1) / 3 * scale**2 == pytest.approx(usual.abs().max().item() ** 2 / 3, rel=0.03)
    pool, computing = FrozenExpertPool(config, dtype=torch.bfloat16), FrozenExpertPool(config)
    assert pool.w_down_eFD.dtype == pool.w_up_eDF.dtype == torch.int8 and pool.b_up_eD.dtype == torch.bfloat16
    for slot in range(3):
        drawn = expert_weights(config, 0, 0, slot)[:2]
        for bf16, fp32, weight in zip(pool.weights.matrices(slot), computing.weights.matrices(slot), drawn, strict=True):
            assert bf16.dtype == torch.bfloat16 and bf16.float().equal(weight) and fp32.equal(weight), "exact in both"


@pytest.mark.parametrize(("d_model", "d_ffn", "gain"), [(512, 1024, 1.0), (64, 96, 0.3), (100, 37, 16.0)])
def test_weights_in_fp8_are_values_of_e4m3_with_the_variance_of_the_default_init(d_model, d_ffn, gain):
    config = SoMEConfig(d_model=d_model, d_ffn=d_ffn, num_experts=3, top_k=1, expert_gain=gain, expert_grid="fp8")
    # Sign, 4 bits of exponent, 3 of mantissa: 0 to 7 eighths at 2^-6, then 8 to 15 eighths of 2^-6 to 2^8, the last NaN.
    positive = [m / 8 * 2**-6 for m in range(8)] + [(8 + m) / 8 * 2.0**e for e in range(-6, 9) for m in range(8)][:-1]
    values = torch.tensor([sign * value for value in positive for sign in (-1, 1)])
    usual = expert_weights(replace(config, expert_grid="none"), 0, 0, 0)[:2]
    for scale, weight, continuous in zip(scales(config), expert_weights(config, 0, 0, 0)[:2], usual, strict=True):
        assert math.log2(scale) == round(math.log2(scale)) and torch.isin(weight / scale, values).all()
        assert 208 <= (weight / scale).abs().max() <= 448, "the largest values are used"
        assert weight.std().item() == pytest.approx(continuous.std().item(), rel=0.03)
    pool, computing = FrozenExpertPool(config, dtype=torch.bfloat16), FrozenExpertPool(config)
    assert pool.w_down_eFD.nbytes == 3 * d_model * d_ffn and pool.b_up_eD.dtype == torch.bfloat16
    assert pool.kernel == "loop"
    for slot in range(3):
        drawn = expert_weights(config, 0, 0, slot)[:2]
        for bf16, fp32, weight in zip(pool.weights.matrices(slot), computing.weights.matrices(slot), drawn, strict=True):
            assert bf16.dtype == torch.bfloat16 and bf16.float().equal(weight) and fp32.equal(weight), "exact in both"


def test_pools_on_a_grid_move_as_others_do():
    for grid in ("int8", "fp8"):
        config = replace(WIDE, expert_grid=grid)
        moved = FrozenExpertPool(config, layer=1, seed=3, expert_ids=[0, 2, 1])
        moved.hold([2, 3, 0])
        assert moved.content_hash() == FrozenExpertPool(config, layer=1, seed=3, expert_ids=[2, 3, 0]).content_hash()


@pytest.mark.parametrize("grid", ["none", "int8", "fp8"])
def test_a_pool_that_is_cast_or_moved_is_as_if_built_so(grid):
    config, generator = replace(WIDE, expert_grid=grid), torch.Generator().manual_seed(0)
    fp32, bf16 = FrozenExpertPool(config), FrozenExpertPool(config, dtype=torch.bfloat16)
    cast = FrozenExpertPool(config).to(torch.bfloat16)
    assert cast.kernel == bf16.kernel and cast.content_hash() == bf16.content_hash()
    slots_TK = make_slots(50, WIDE.num_experts, 2, 0.0, generator)
    x_TD, gates_TK = torch.randn(50, WIDE.d_model, generator=generator), torch.rand(50, 2, generator=generator)
    wide = bf16.float()
    assert wide.kernel == fp32.kernel and wide.weights.dtype == torch.float32
    # Values on a grid are the same in both; others were rounded once.
    tolerance = 1e-5 if grid != "none" else 1e-2
    expected_TD = fp32(x_TD, gates_TK, slots_TK)
    assert (wide(x_TD, gates_TK, slots_TK) - expected_TD).norm() <= tolerance * expected_TD.norm()
    there = FrozenExpertPool(config, dtype=torch.bfloat16).to("meta")
    assert there.kernel == "loop", "the kernels for CPUs and GPUs cannot read what lies elsewhere"
    assert {buffer.device.type for buffer in there.buffers()} == {"meta"}


def test_a_grid_is_for_uniform_weights():
    with pytest.raises(ValueError, match="expert_grid = int8 draws uniform values, and model.some.expert_init = sparse"):
        SoMEConfig(expert_grid="int8", expert_init="sparse")


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


@pytest.mark.parametrize(
    ("kernel", "dtype", "x_dtype", "tolerance"),
    [
        ("loop", torch.float32, torch.float32, 1e-6),
        ("loop", torch.bfloat16, torch.bfloat16, 6e-3),
        ("amx", torch.bfloat16, torch.bfloat16, 6e-3),
        ("amx", torch.bfloat16, torch.float32, 5e-3),
        ("amx", torch.bfloat16, torch.float16, 5e-3),
        ("simd", torch.float32, torch.float32, 1e-6),
        ("simd", torch.float32, torch.bfloat16, 3e-3),
        ("grouped", torch.float32, torch.float32, 1e-6),
        ("grouped", torch.bfloat16, torch.bfloat16, 6e-3),
    ],
)
@pytest.mark.parametrize("grid", ["none", "int8", "fp8"])
@pytest.mark.parametrize(
    ("tokens", "top_k", "elsewhere"), [(40, 2, 0.0), (1, 1, 0.0), (700, 3, 0.4), (1500, 6, 0.0), (9, 2, 1.0)]
)
def test_outputs_and_gradients_equal_the_reference_in_float64(
    kernel, dtype, x_dtype, tolerance, tokens, top_k, elsewhere, grid
):
    if kernel in ("amx", "simd") and grid == "fp8":
        pytest.skip("the fused kernels do not read fp8")
    pool = make_pool(kernel, dtype, replace(WIDE, expert_grid=grid))
    check_against_float64(pool, x_dtype, tolerance, tokens, top_k, elsewhere)


def test_the_fused_kernel_does_not_depend_on_threads():
    check_threads(make_pool("amx", torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize(("kernel", "dtype"), COMPUTING)
def test_nothing_but_preactivations_is_kept_for_the_backward(kernel, dtype):
    pool = make_pool(kernel, dtype)
    x_TD = torch.randn(64, WIDE.d_model).to(dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        pool(x_TD, torch.rand(64, 1, requires_grad=True), torch.zeros(64, 1, dtype=torch.int64))
    pool_storages = {buffer.data_ptr() for buffer in pool.buffers()}
    own = [(t.numel(), t.dtype) for t in kept if t.data_ptr() not in pool_storages]
    assert own == [(64, torch.float32), (64 * WIDE.d_ffn, dtype)], "gates and h alone"


@pytest.mark.parametrize(("kernel", "dtype"), COMPUTING)
def test_no_rows_at_all(kernel, dtype):
    pool = make_pool(kernel, dtype)
    x_TD = torch.randn(0, WIDE.d_model).to(dtype).requires_grad_()
    y_TD = pool(x_TD, torch.zeros(0, 2, requires_grad=True), torch.zeros(0, 2, dtype=torch.int64))
    y_TD.sum().backward()
    assert y_TD.shape == x_TD.grad.shape == (0, WIDE.d_model)


def test_a_pool_uses_the_fused_kernel_where_it_can():
    def kernel(config, **options):
        return FrozenExpertPool(config, **options).kernel

    bf16 = {"dtype": torch.bfloat16}
    assert kernel(CONFIG, **bf16) == kernel(CONFIG) == kernel(WIDE, dtype=torch.float64) == "loop", (
        "no width or dtype for it"
    )
    assert kernel(WIDE, **bf16) == ("loop" if why_not_amx() else "amx")
    assert kernel(WIDE) == ("loop" if why_not_simd() else "simd")
    for options, why_not, multiple in ((bf16, why_not_amx(), 32), ({}, why_not_simd(), 16)):
        narrow = FrozenExpertPool(CONFIG, **options).describe_kernel()
        assert narrow == f"loop, as {why_not or f'widths are not multiples of {multiple}'}"


def test_without_a_compiler_the_loop_computes_and_the_reason_is_known(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    cached = load_library, why_not_amx, experts_simd.why_not_built
    for function in cached:
        function.cache_clear()
    try:
        assert "apt install g++) or set CXX" in why_not_amx() or why_not_amx().startswith("the processor has no")
        assert "apt install g++) or set CXX" in why_not_simd() or why_not_simd().startswith("torch uses neither")
        for dtype, reason in ((torch.bfloat16, why_not_amx()), (torch.float32, why_not_simd())):
            pool = FrozenExpertPool(WIDE, dtype=dtype)
            assert pool.kernel == "loop" and pool.describe_kernel() == f"loop, as {reason}"
    finally:
        for function in cached:
            function.cache_clear()


def test_manifest_tells_pools_apart():
    manifest = pool_manifest(CONFIG, 2, seed=0)
    assert manifest == pool_manifest(CONFIG, 2, seed=0)
    assert manifest["sample_sha256"] != pool_manifest(CONFIG, 2, seed=1)["sample_sha256"]
    sparse = SoMEConfig(d_model=16, num_experts=6, d_ffn=24, top_k=2, expert_init="sparse")
    assert manifest["sample_sha256"] != pool_manifest(sparse, 2, seed=0)["sample_sha256"]
    assert manifest["sample_sha256"] != pool_manifest(replace(CONFIG, expert_grid="int8"), 2, seed=0)["sample_sha256"]
