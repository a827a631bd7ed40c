"""The fused cross entropy against torch's, whose gradient it writes down itself."""

import pytest
import torch

from modeling.cross_entropy import NO_TARGET, SLICE, cross_entropy, reference

SIZES = [0, 1, SLICE - 1, SLICE, SLICE + 1, 2 * SLICE, 300]
# Losses are fp32 in both. softmax - 1 loses what fp32 cannot tell from 1. A bf16 gradient is rounded three times (softmax,
# weight, product) by 2^-8 at most, torch's once.
GRADIENT = {torch.float32: dict(atol=1e-6, rtol=1e-5), torch.bfloat16: dict(atol=1e-6, rtol=4 * 2**-8)}


def make(N: int, V: int, dtype: torch.dtype, ignored: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, targets of which a share is -100, and a weight of either sign for each loss; one weight is 0."""
    generator = torch.Generator().manual_seed(N + V)
    logits_NV = (3 * torch.randn(N, V, generator=generator)).to(dtype)
    targets_N = torch.randint(0, V, (N,), generator=generator)
    targets_N[torch.rand(N, generator=generator) < ignored] = NO_TARGET
    weights_N = torch.randn(N, generator=generator)
    weights_N[N // 2 : N // 2 + 1] = 0
    return logits_NV, targets_N, weights_N


def run(function, logits_NV: torch.Tensor, targets_N: torch.Tensor, weights_N: torch.Tensor):
    leaf_NV = logits_NV.clone().requires_grad_()
    losses_N = function(leaf_NV, targets_N)
    (losses_N * weights_N).sum().backward()
    return losses_N.detach(), leaf_NV.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("V", [2, 61])
@pytest.mark.parametrize("N", SIZES)
def test_losses_and_gradients_equal_the_reference(N, V, dtype):
    logits_NV, targets_N, weights_N = make(N, V, dtype)
    losses_N, grad_NV = run(cross_entropy, logits_NV, targets_N, weights_N)
    expected_N, expected_NV = run(reference, logits_NV, targets_N, weights_N)
    assert losses_N.dtype == torch.float32 and grad_NV.dtype == dtype and grad_NV.shape == (N, V)
    torch.testing.assert_close(losses_N, expected_N, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grad_NV, expected_NV, **GRADIENT[dtype])
    ignored_N = targets_N == NO_TARGET
    assert not losses_N[ignored_N].any() and not grad_NV[ignored_N].any()
    if N > SLICE - 2:
        assert ignored_N[:SLICE].any() and not ignored_N[:SLICE].all()


def test_the_reference_is_the_definition():
    """-log softmax of the target, one position after the other, in float64."""
    logits_NV, targets_N, weights_N = make(40, 7, torch.float32)
    leaf_NV = logits_NV.double().requires_grad_()
    losses = []
    for logits_V, target in zip(leaf_NV, targets_N.tolist(), strict=True):
        probabilities_V = torch.exp(logits_V) / torch.exp(logits_V).sum()
        losses.append(-torch.log(probabilities_V[target]) if target != -100 else 0 * logits_V.sum())
    sum(w * loss for w, loss in zip(weights_N.double(), losses, strict=True)).backward()
    for function in (reference, cross_entropy):
        losses_N, grad_NV = run(function, logits_NV, targets_N, weights_N)
        torch.testing.assert_close(losses_N.double(), torch.stack(losses).detach(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(grad_NV.double(), leaf_NV.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("N", [SLICE + 1, 300])
def test_nothing_to_learn_without_targets(N, dtype):
    logits_NV, targets_N, weights_N = make(N, 9, dtype, ignored=1.0)
    losses_N, grad_NV = run(cross_entropy, logits_NV, targets_N, weights_N)
    assert (targets_N == NO_TARGET).all() and not losses_N.any() and not grad_NV.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_inputs_are_left_as_they_are(dtype):
    logits_NV, targets_N, weights_N = make(300, 61, dtype)
    kept_NV, kept_N = logits_NV.clone(), targets_N.clone()
    run(lambda leaf_NV, t_N: cross_entropy(logits_NV.requires_grad_(), t_N), logits_NV.detach(), targets_N, weights_N)
    assert torch.equal(logits_NV, kept_NV) and torch.equal(targets_N, kept_N)
    with torch.no_grad():
        cross_entropy(logits_NV, targets_N)
    assert torch.equal(logits_NV, kept_NV) and torch.equal(targets_N, kept_N)


def test_a_view_gives_the_same():
    logits_NV, targets_N, weights_N = make(300, 61, torch.float32)
    strided_NV = logits_NV.T.contiguous().T
    assert not strided_NV.is_contiguous()
    ours = run(cross_entropy, logits_NV, targets_N, weights_N)
    leaf_NV = strided_NV.clone(memory_format=torch.preserve_format).requires_grad_()
    assert not leaf_NV.is_contiguous()
    losses_N = cross_entropy(leaf_NV, targets_N)
    (losses_N * weights_N).sum().backward()
    torch.testing.assert_close(losses_N, ours[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(leaf_NV.grad, ours[1], atol=1e-7, rtol=1e-5)


def test_logits_of_any_size_stay_finite():
    logits_NV = torch.tensor([[1e4, 0.0, -1e4], [-1e30, 0.0, 1e30], [-100.0, -101.0, -102.0]])
    targets_N = torch.tensor([2, 0, 1])
    losses_N, grad_NV = run(cross_entropy, logits_NV, targets_N, torch.ones(3))
    expected_N, expected_NV = run(reference, logits_NV, targets_N, torch.ones(3))
    assert grad_NV.isfinite().all()
    # The normaliser of a row is rounded like its largest logit.
    torch.testing.assert_close(losses_N, expected_N, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(grad_NV, expected_NV, atol=1e-5, rtol=0)
    assert losses_N[0] == 2e4 and losses_N[1] == 2e30


def test_no_fp32_copy_of_all_logits_is_kept():
    logits_NV, targets_N, _ = make(300, 61, torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        cross_entropy(logits_NV.requires_grad_(), targets_N)
        assert sorted((t.dtype, t.numel()) for t in kept if t.numel() > 300) == [(torch.bfloat16, 300 * 61)]
        kept.clear()
        cross_entropy(logits_NV.detach(), targets_N)
    assert not kept, "evaluation keeps nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_gradient_of_a_mean_over_many_targets_is_not_rounded_away(dtype):
    """A step divides by the targets of the global batch: in bf16 such weights are small but far from its smallest number."""
    logits_NV, targets_N, _ = make(300, 61, dtype)
    weights_N = torch.full((300,), 1 / 1_000_003)
    _, grad_NV = run(cross_entropy, logits_NV, targets_N, weights_N)
    _, expected_NV = run(reference, logits_NV, targets_N, weights_N)
    torch.testing.assert_close(grad_NV, expected_NV, atol=1e-12, rtol=GRADIENT[dtype]["rtol"])
