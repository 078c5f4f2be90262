"""Where both implementations are held to the same numbers: by hand, and with large logits, where
gradients are as exact as plain float32 torch's though they round in different places."""

from __future__ import annotations

import pytest
import torch

from kernels import vocab_parallel_linear_logprob
from tests.ops.dense import dense_result
from tests.ops.triton_cases import BIG, DEVICE, make, run, use_blocks

# The interpreter computes rows past the end as well; they are not stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
N, D, V = 64, 64, 1000
IMPLS = pytest.mark.parametrize("impl", ["torch", "triton"])


def plain(hidden, weight, bias, labels):
    return (hidden @ weight.T + bias).log_softmax(1).gather(1, labels[:, None])[:, 0]


def row_errors(actual, expected):
    return (actual.double() - expected).norm(dim=1) / expected.norm(dim=1)


@pytest.mark.parametrize("budget", [0, 2**40], ids=["strict", "cached"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    ("scale", "offset"), [(1.0, 100.0), (1.0, 1000.0), (20.0, 0.0), (200.0, 0.0)]
)
def test_dhidden_is_as_exact_as_plain_float32(scale, offset, impl, budget, monkeypatch):
    use_blocks(monkeypatch, BIG)
    generator = torch.Generator().manual_seed(int(scale + offset))
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) * scale / D**0.5
    labels = torch.randint(0, V, (N,), generator=generator)
    grad = torch.randn(N, generator=generator)
    hidden, weight, labels, grad = (x.to(DEVICE) for x in (hidden, weight, labels, grad))
    bias = torch.full((V,), offset, device=DEVICE)
    expected = dense_result(hidden, weight, labels, bias=bias, grad_logps=grad).grads["hidden"]
    hidden.requires_grad_()
    (of_plain,) = torch.autograd.grad(plain(hidden, weight, bias, labels), hidden, grad)
    logps = vocab_parallel_linear_logprob(
        hidden, weight, labels, bias=bias, impl=impl, cache_budget_bytes=budget
    )
    (ours,) = torch.autograd.grad(logps, hidden, grad)
    for quantile in (0.5, 0.99):
        bar = 2 * row_errors(of_plain, expected).quantile(quantile) + 1e-7
        assert row_errors(ours, expected).quantile(quantile) <= bar


@IMPLS
def test_uniform_logits_give_log_v(impl):
    weight = make(3, 8, 1000)[0]["weight"]
    logps, entropy = vocab_parallel_linear_logprob(
        torch.zeros(3, 8, device=DEVICE), weight, torch.tensor([0, 500, 999], device=DEVICE),
        return_entropy=True, impl=impl,
    )  # fmt: skip
    expected = torch.full((3,), 1000.0, device=DEVICE).log()
    torch.testing.assert_close(logps, -expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy, expected, rtol=1e-6, atol=0)


@IMPLS
def test_entropy_of_a_confident_token_is_exact(impl):
    """Two columns, gap x: H = log(1 + e^-x) + x e^-x / (1 + e^-x), tiny for a large gap."""
    gaps = torch.tensor([5.0, 20.0, 40.0, 80.0], device=DEVICE)
    _, entropy = vocab_parallel_linear_logprob(
        gaps[:, None], torch.tensor([[1.0], [0.0]], device=DEVICE),
        torch.zeros(4, dtype=torch.int64, device=DEVICE), return_entropy=True, impl=impl,
    )  # fmt: skip
    x = gaps.double()
    expected = torch.log1p(torch.exp(-x)) + x * torch.sigmoid(-x)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=0)


@IMPLS
def test_an_entropy_without_gradient_leaves_the_cache_in_use(impl):
    operands, labels, grad, _ = make(12, 16, 300, bias=True)
    options = {"labels": labels, "impl": impl, "cache_budget_bytes": 2**30, "return_entropy": True}
    logps, entropy = vocab_parallel_linear_logprob(**operands, **options, entropy_grad=False)
    assert not entropy.requires_grad and logps.grad_fn.cache is not None
    kept = torch.autograd.grad(logps, list(operands.values()), grad)
    expected = dense_result(labels=labels, grad_logps=grad, **operands)
    torch.testing.assert_close(entropy.double(), expected.entropy, rtol=1e-6, atol=1e-6)
    for name, gradient in zip(operands, kept, strict=True):
        torch.testing.assert_close(gradient.double(), expected.grads[name], rtol=1e-4, atol=1e-5)
    logps, _ = vocab_parallel_linear_logprob(**operands, **options)
    assert logps.grad_fn.cache is None  # its gradient needs the logits


@IMPLS
def test_one_column_has_no_entropy(impl):
    operands, labels, grad, grad_entropy = make(4, 16, 1)
    logps, entropy, grads = run(operands, labels, grad, grad_entropy, impl=impl)
    assert not logps.any() and not entropy.any()
    assert not any(value.any() for value in grads.values())
