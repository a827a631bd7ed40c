"""The fused kernel for fp32, in each of its variants that this machine can run.

Shapes: T tokens, K experts a token.
"""

import ctypes
import math
from dataclasses import replace

import pytest
import torch

from modeling.some import FrozenExpertPool, SoMEConfig, experts_simd
from modeling.some.native import load_library
from tests.modeling.expert_pools import WIDE, check_against_float64, check_threads, make_pool, make_slots

# Tiles of one vector and of two, numbers of rows of weights that no block divides, contraction over 16 alone.
ODD = SoMEConfig(d_model=16, num_experts=5, d_ffn=208, top_k=2)


@pytest.fixture(params=["AVX2", "AVX512"])
def variant(request, monkeypatch) -> str:
    """The kernel computes with these instructions from here on."""
    found = torch.backends.cpu.get_cpu_capability()
    if found not in ("AVX512", request.param):
        pytest.skip(f"torch finds no {request.param} here, but {found}")
    monkeypatch.setattr(experts_simd, "capability", lambda: request.param)
    return request.param


def run(pool: FrozenExpertPool, x_TD, gates_TK, slots_TK, grad_TD) -> list[torch.Tensor]:
    """Output, and gradients of tokens and gates."""
    x, gates = x_TD.clone().requires_grad_(), gates_TK.clone().requires_grad_()
    y_TD = pool(x, gates, slots_TK)
    y_TD.backward(grad_TD)
    return [y_TD.detach(), x.grad, gates.grad]


@pytest.mark.parametrize("grid", ["none", "int8"])
@pytest.mark.parametrize("config", [WIDE, ODD], ids=["wide", "odd"])
@pytest.mark.parametrize(
    ("tokens", "top_k", "elsewhere"), [(1, 1, 0.0), (2, 2, 0.0), (41, 2, 0.0), (701, 3, 0.4), (1501, 5, 0.0), (9, 2, 1.0)]
)
def test_outputs_and_gradients_equal_the_reference_in_float64(variant, config, tokens, top_k, elsewhere, grid):
    pool = make_pool("simd", torch.float32, replace(config, expert_grid=grid))
    check_against_float64(pool, torch.float32, 1e-6, tokens, top_k, elsewhere)


@pytest.mark.parametrize("tokens", range(1, 40))
def test_every_number_of_rows_equals_the_reference(variant, tokens):
    check_against_float64(make_pool("simd", torch.float32), torch.float32, 1e-6, tokens, 1, 0.0)


def test_the_usual_width_equals_the_reference(variant):
    pool = make_pool("simd", torch.float32, SoMEConfig(d_model=512, num_experts=4, d_ffn=1024, top_k=2))
    check_against_float64(pool, torch.float32, 2e-6, 300, 2, 0.1)


def test_results_do_not_depend_on_threads(variant):
    check_threads(make_pool("simd", torch.float32), torch.float32)


def test_a_row_does_not_depend_on_the_others(variant):
    pool, generator = make_pool("simd", torch.float32), torch.Generator().manual_seed(0)
    slots_TK = make_slots(500, WIDE.num_experts, 2, 0.0, generator)
    x_TD, grad_TD = torch.randn(2, 500, WIDE.d_model, generator=generator)
    gates_TK = torch.rand(500, 2, generator=generator)
    whole = run(pool, x_TD, gates_TK, slots_TK, grad_TD)
    for start, end in ((0, 1), (3, 40), (100, 499)):
        part = run(pool, *(values[start:end] for values in (x_TD, gates_TK, slots_TK, grad_TD)))
        assert all(torch.equal(a, b[start:end]) for a, b in zip(part, whole, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["input", "gradient"])
def test_what_is_not_finite_reaches_the_results_of_its_token_alone(variant, bad, where):
    pool, generator = make_pool("simd", torch.float32), torch.Generator().manual_seed(0)
    slots_TK = make_slots(100, WIDE.num_experts, 2, 0.0, generator)
    x_TD, grad_TD = torch.randn(2, 100, WIDE.d_model, generator=generator)
    gates_TK = torch.rand(100, 2, generator=generator)
    (x_TD if where == "input" else grad_TD)[37, 5] = bad
    y_TD, grad_x_TD, grad_gates_TK = run(pool, x_TD, gates_TK, slots_TK, grad_TD)
    others_T = torch.arange(100) != 37
    for values in (y_TD, grad_x_TD, grad_gates_TK):
        assert values[others_T].isfinite().all()
    results = (y_TD, grad_x_TD, grad_gates_TK) if where == "input" else (grad_x_TD, grad_gates_TK)
    assert not any(values[37].isfinite().any() for values in results)


def gelu(variant: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's GELU and its derivative; a multiple of 16 values."""
    value, slope = torch.empty_like(x), torch.empty_like(x)
    library = load_library(experts_simd.SOURCE, *experts_simd.FLAGS[variant])
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, value, slope)]
    library.experts_gelu(pointers[0], ctypes.c_int64(len(x)), *pointers[1:])
    return value, slope


def test_gelu_is_exact_to_fp32(variant):
    """Relative errors, also far to the left, where torch's own fp32 GELU has lost its digits."""
    make_pool("simd", torch.float32)  # skips where it cannot be built
    x = torch.cat([torch.linspace(-13, 13, 1 << 18), torch.linspace(-1, 1, 1 << 16), torch.logspace(-38, 38, 1 << 12)])
    value, slope = gelu(variant, x)
    phi = torch.special.erfc(-x.double() / math.sqrt(2)) / 2
    density = torch.exp(-x.double().square() / 2) / math.sqrt(2 * math.pi)
    expected, derivative = x.double() * phi, phi + x.double() * density
    normal = expected.abs() > 1e-37
    assert ((value - expected).abs() / expected.abs())[normal].max() < 1e-6
    assert value[~normal].abs().max() < 1e-36
    assert (slope - derivative).abs().max() < 3e-7
    usual = torch.nn.functional.gelu(x)
    assert (value - usual).abs().div(x.abs().clamp(min=1)).max() < 1e-6


def test_gelu_of_extreme_values(variant):
    make_pool("simd", torch.float32)
    x = torch.tensor(
        [0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 100, -100, -13.2, -20, 1e20, -1e20, math.inf, -math.inf, math.nan, 1]
    )
    value, slope = gelu(variant, x)
    right = torch.nn.functional.gelu(torch.ones(1)).item()
    expected = torch.tensor([0, 0, 0, 0, 3e38, 0, 100, 0, 0, 0, 1e20, 0, math.inf, math.nan, math.nan, right])
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-36, equal_nan=True)
    steep = torch.tensor([0.5, 0.5, 0.5, 0.5, 1, 0, 1, 0, 0, 0, 1, 0, math.nan, math.nan, math.nan, 1.0833154])
    torch.testing.assert_close(slope, steep, rtol=1e-6, atol=1e-36, equal_nan=True)


def test_torchs_own_variable_chooses_the_variant(monkeypatch):
    """As torch reads it at its start: ATEN_CPU_CAPABILITY=default leaves neither, and the loop says so."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    pool = FrozenExpertPool(WIDE)
    assert pool.kernel == "loop"
    assert pool.describe_kernel() == "loop, as torch uses neither AVX2 nor AVX-512 (but DEFAULT)"
    on_fp8 = FrozenExpertPool(replace(WIDE, expert_grid="fp8")).describe_kernel()
    assert on_fp8 == "loop, as the fused kernel does not read torch.float8_e4m3fn"
