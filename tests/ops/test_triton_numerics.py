"""The Triton operator where floats run out: logits far from zero, confident tokens, masked tiles,
labels far away from the others."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import vocab_parallel_linear_logprob
from tests.ops.dense import error, row_error
from tests.ops.triton_cases import (
    DEVICE,
    EVERYTHING,
    budget_of,
    check,
    expect,
    make,
    poisoned_memory,  # noqa: F401 - applies to every test
    run,
    small_tiles,  # noqa: F401
)

pytestmark = [
    pytest.mark.usefixtures("small_tiles"),
    # numpy's: rows of a tile past the last token may hold anything, and are not stored
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]
BUDGETS = pytest.mark.parametrize("budget", [0, EVERYTHING], ids=["strict", "cached"])


@BUDGETS
@pytest.mark.parametrize("shift", [-500.0, -100.0, 100.0, 500.0])
def test_all_logits_far_from_zero(shift, budget):
    """exp of every raw logit over- or underflows; only the rounding of the logits may remain."""
    operands, labels, grad, grad_entropy = make(20, 16, 300, bias=True)
    with torch.no_grad():
        operands["bias"] += shift
    rounding = 4 * abs(shift) * 2**-23
    bars = {"forward_bar": rounding, "grad_bar": 2 * rounding}
    check(operands, labels, grad, cache_budget_bytes=budget, **bars)
    if not budget:  # the entropy adds up V rounded p (log p + H)
        bars["forward_bar"] = 8 * rounding
        check(operands, labels, grad, grad_entropy, **bars)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@BUDGETS
def test_logits_beyond_the_range_of_float16(dtype, budget):
    operands, labels, grad, _ = make(16, 16, 300, dtype)
    with torch.no_grad():
        operands["hidden"] *= 200
        operands["weight"] *= 200
    expected = expect(operands, labels, grad)
    assert expected.logps.abs().max() > 65504
    logps, _, grads = run(operands, labels, grad, cache_budget_bytes=budget)
    torch.testing.assert_close(logps.double(), expected.logps, rtol=1e-6, atol=0.1)
    assert all(torch.isfinite(value).all() for value in grads.values())


def confident_rows(misses: torch.Tensor, dtype=torch.float32):
    """One row for each wanted 1 - p, of its own label, over peaked weights: each row has a feature
    of its own that raises its label alone."""
    n, d, v = len(misses), 16, 300
    operands, _, grad, _ = make(n, d, v, dtype)
    rows = torch.arange(n, device=DEVICE)
    labels = rows * (v // n)
    hidden, weight = operands["hidden"].detach(), operands["weight"].detach()
    own = torch.zeros(v, n, device=DEVICE, dtype=dtype)
    own[labels, rows] = 1
    lift = torch.zeros(n, device=DEVICE, dtype=torch.float64)
    for _ in range(2):  # twice: the lift is rounded to the operands' type
        operands = {
            "hidden": torch.cat([hidden, lift.diag().to(dtype)], 1).requires_grad_(),
            "weight": torch.cat([weight, own], 1).requires_grad_(),
        }
        odds = expect(operands, labels, None).miss.logit()
        lift = lift + odds - misses.to(DEVICE).logit()
    return operands, labels, grad, odds


@BUDGETS
def test_confident_tokens_keep_their_digits(budget):
    """1 - p from 1e-12 to 0.4, each row by itself: from a rounded logp, 1 - exp(logp) is 0 in
    float32 below 6e-8. What remains is the rounding of logits of up to 35."""
    misses = torch.logspace(-12, -0.4, 60, dtype=torch.float64)
    operands, labels, grad, odds = confident_rows(misses)
    assert odds.max() > -1 and odds.min() < -27
    expected = expect(operands, labels, grad)
    logps, _, grads = run(operands, labels, grad, cache_budget_bytes=budget)
    miss = -torch.expm1(logps.double())
    assert ((miss - expected.miss) / expected.miss).abs().max() <= 2e-5
    assert row_error(grads["hidden"], expected.grads["hidden"]) <= 2e-5
    assert row_error(grads["weight"], expected.grads["weight"]) <= 1e-4


@BUDGETS
def test_rows_of_bfloat16_gradients_confident_or_not(budget):
    """The 99th percentile of rows; the largest probability is rounded once, not 1 - p."""
    misses = torch.logspace(-7, -0.2, 100, dtype=torch.float64)
    operands, labels, grad, _ = confident_rows(misses, torch.bfloat16)
    expected = expect(operands, labels, grad).grads["hidden"]
    _, _, grads = run(operands, labels, grad, cache_budget_bytes=budget)
    difference = (grads["hidden"].double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert difference.quantile(0.99) <= 5e-3


@pytest.mark.parametrize("gap", [-100.0, 100.0])
@pytest.mark.parametrize("label", [3, 150, 299])
@pytest.mark.parametrize("budget", [0, EVERYTHING, budget_of(2, 8)])
def test_the_labels_tile_far_above_or_below_the_others(gap, label, budget):
    operands, _, grad, _ = make(8, 16, 300, bias=True)
    begin = label // 64 * 64
    with torch.no_grad():
        operands["bias"][begin : begin + 64] += gap
    labels = torch.full((8,), label, device=DEVICE)
    bars = {"forward_bar": 5e-5, "grad_bar": 1e-4}
    check(operands, labels, grad, cache_budget_bytes=budget, **bars)


@BUDGETS
@pytest.mark.parametrize("gap", [30.0, 1e4])
def test_a_label_far_below_all_others(gap, budget):
    """Its own probability is lost; everybody else's must not be, nor their gradients."""
    operands, labels, grad, _ = make(8, 16, 300, bias=True)
    labels[:] = 7
    with torch.no_grad():
        operands["bias"][7] -= gap
    check(operands, labels, grad, cache_budget_bytes=budget)


@pytest.mark.parametrize("v", [2, 31, 33, 64, 65, 97])
def test_slices_without_a_column_that_counts(v):
    """Slices past the vocabulary, and a last one that holds the label alone."""
    operands, labels, grad, grad_entropy = make(6, 16, v)
    labels[:3] = v - 1
    check(operands, labels, grad, cache_budget_bytes=EVERYTHING)
    check(operands, labels, grad, grad_entropy)


@BUDGETS
def test_tiles_at_minus_infinity(budget):
    """A bias of -inf forbids ids: whole tiles, and single columns among others."""
    operands, labels, grad, _ = make(8, 16, 300, bias=True)
    labels[:] = 10
    with torch.no_grad():
        operands["bias"][64:192] = -torch.inf
        operands["bias"][5] = -torch.inf
    kept = operands["bias"].isfinite()
    small = {name: x.detach()[kept].requires_grad_() for name, x in operands.items() if x.dim() < 2}
    small["weight"] = operands["weight"].detach()[kept].requires_grad_()
    small["hidden"] = operands["hidden"]
    expected = expect(small, labels - 1, grad)  # column 5 is gone
    logps, _, grads = run(operands, labels, grad, cache_budget_bytes=budget)
    torch.testing.assert_close(logps.double(), expected.logps, rtol=1e-6, atol=1e-5)
    assert error(grads["hidden"], expected.grads["hidden"]) <= 2e-5
    for name in ("weight", "bias"):
        assert error(grads[name][kept], expected.grads[name]) <= 2e-5
        assert not grads[name][~kept].any()


@pytest.mark.parametrize("gap", [-30.0, -21.0, 0.0, 21.0, 30.0])
def test_two_columns_by_hand(gap):
    logps = vocab_parallel_linear_logprob(
        torch.tensor([[1.0]], device=DEVICE),
        torch.tensor([[0.0], [gap]], device=DEVICE),
        torch.tensor([0], device=DEVICE),
        impl="triton",
    )
    # log 1 / (1 + e^gap), to all digits on either side
    expected = -math.log1p(math.exp(gap)) if gap < 0 else -gap - math.log1p(math.exp(-gap))
    assert logps.item() == pytest.approx(expected, rel=1e-6)


def test_gradient_of_the_entropy_alone():
    operands, labels, grad, grad_entropy = make(20, 16, 300)
    check(operands, labels, torch.zeros_like(grad), grad_entropy)
