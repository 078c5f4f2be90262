"""Values and gradients of the torch operator against the float64 form with all logits, with
backward strict (nothing kept of forward), cached, and some columns of each."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kernels.reference
from kernels import vocab_parallel_linear_logprob
from kernels.head import gradient_dtype
from tests.ops import cases
from tests.ops.cases import BARS, make
from tests.ops.dense import dense_result, error, row_error, row_errors

# (N, D, V): vocabulary sizes of real models, odd sizes, no tokens, one column.
SHAPES = [
    (129, 72, 16032),
    (1, 896, 18992),
    (33, 576, 32064),
    (7, 100, 50257),
    (127, 24, 255),
    (5, 4096, 129),
    (4, 16, 1),
    (0, 64, 255),
]
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"logit_softcap": 3.0},
    {"temperature": 1.3, "logit_softcap": 2.0},
]


# Share of the vocabulary whose exponentials forward may keep. 0.4 ends within a chunk.
@pytest.fixture(params=[0, 0.4, 1], ids=["strict", "mixed", "cached"])
def keep(request):
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    """64 columns at a time, so that small vocabularies take many chunks too."""
    monkeypatch.setattr(kernels.reference, "SCRATCH_BYTES", 0)


def budget_for(operands, keep):
    """Bytes for this share of the vocab columns: their exponentials and one anchor a token."""
    hidden, weight = operands["hidden"], operands["weight"]
    dtype = gradient_dtype(hidden, weight)
    anchor_bytes = 8 if dtype == torch.float64 else 4
    return len(hidden) * (anchor_bytes + int(keep * len(weight)) * dtype.itemsize)


def run(operands, labels, grad_logps, grad_entropy=None, keep=0, **options):
    options.setdefault("cache_budget_bytes", budget_for(operands, keep))
    return cases.run(operands, labels, grad_logps, grad_entropy, **options)


def check(operands, labels, grad_logps, grad_entropy=None, keep=0, **options):
    dtype = operands["hidden"].dtype
    expected = dense_result(
        labels=labels, grad_logps=grad_logps, grad_entropy=grad_entropy, **operands, **options
    )
    logps, entropy, grads = run(operands, labels, grad_logps, grad_entropy, keep, **options)
    forward_bar, grad_bar = BARS[dtype]
    assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logps.double(), expected.logps, rtol=1e-6, atol=forward_bar)
    if entropy is not None:
        torch.testing.assert_close(
            entropy.detach().double(), expected.entropy, rtol=1e-6, atol=forward_bar
        )
    for name, grad in grads.items():
        assert grad.dtype == operands[name].dtype
        assert error(grad, expected.grads[name]) <= grad_bar, name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_matches_the_float64_form(shape, keep):
    operands, labels, grad, _ = make(*shape)
    if shape[2] == 1:  # nothing to choose from: both sides are exactly zero
        logps, _, grads = run(operands, labels, grad, keep=keep)
        assert not logps.any() and not any(g.any() for g in grads.values())
    else:
        check(operands, labels, grad, keep=keep)


@pytest.mark.parametrize("dtype", list(BARS), ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_every_option_in_every_precision_over_many_chunks(dtype, options, keep):
    operands, labels, grad, _ = make(37, 40, 300, dtype, bias=True)
    check(operands, labels, grad, keep=keep, **options)


@pytest.mark.parametrize("dtype", list(BARS), ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_entropy_and_its_gradient(dtype, options):
    operands, labels, grad, grad_entropy = make(37, 40, 300, dtype, bias=True)
    check(operands, labels, grad, grad_entropy, keep=1, **options)  # keeps nothing all the same


@pytest.mark.parametrize("narrow_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("narrow", ["hidden", "weight"])
def test_mixed_operand_types_compute_in_the_wider_one(narrow, narrow_dtype, keep):
    operands, labels, grad, _ = make(20, 32, 200)
    operands[narrow] = operands[narrow].detach().to(narrow_dtype).requires_grad_()
    expected = dense_result(labels=labels, grad_logps=grad, **operands)
    logps, _, grads = run(operands, labels, grad, keep=keep)
    torch.testing.assert_close(logps.double(), expected.logps, rtol=1e-6, atol=1e-5)
    for name, grad in grads.items():
        assert error(grad, expected.grads[name]) <= (8e-3 if name == narrow else 2e-5)


@pytest.mark.usefixtures("small_chunks")
def test_labels_on_the_borders_of_chunks_and_int32_labels(keep):
    operands, _, _, _ = make(10, 16, 200)
    labels = torch.tensor([0, 63, 64, 127, 128, 191, 192, 199, 0, 199], dtype=torch.int32)
    check(operands, labels, torch.randn(10), keep=keep)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30, 0.0])
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("with_entropy", [False, True])
def test_padding_rows_take_no_part_whatever_they_hold(garbage, with_entropy, keep):
    operands, labels, grad, grad_entropy = make(20, 16, 150, bias=True)
    grad_entropy = grad_entropy if with_entropy else None
    expected = run(operands, labels, grad, grad_entropy, keep)
    padded = {
        "hidden": operands["hidden"],
        "weight": torch.cat([operands["weight"].detach(), torch.full((42, 16), garbage)]),
        "bias": torch.cat([operands["bias"].detach(), torch.full((42,), garbage)]),
    }
    for name in ("weight", "bias"):
        padded[name].requires_grad_()
    budget = budget_for(operands, keep)
    logps, entropy, grads = run(
        padded, labels, grad, grad_entropy, vocab_size=150, cache_budget_bytes=budget
    )
    assert torch.equal(logps, expected[0])
    assert not with_entropy or torch.equal(entropy, expected[1])
    assert torch.equal(grads["hidden"], expected[2]["hidden"])
    for name in ("weight", "bias"):
        assert torch.equal(grads[name][:150], expected[2][name])
        assert not grads[name][150:].any()


@pytest.mark.parametrize("shift", [-500.0, -100.0, 100.0, 500.0])
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("with_entropy", [False, True])
def test_all_logits_far_from_zero(shift, with_entropy, keep):
    """exp of every raw logit over- or underflows; only the rounding of the logits may remain."""
    operands, labels, grad, grad_entropy = make(20, 16, 300, bias=True)
    grad_entropy = grad_entropy if with_entropy else None
    with torch.no_grad():
        operands["bias"] += shift
    expected = dense_result(labels=labels, grad_logps=grad, grad_entropy=grad_entropy, **operands)
    logps, entropy, grads = run(operands, labels, grad, grad_entropy, keep)
    rounding = 4 * abs(shift) * 2**-23
    torch.testing.assert_close(logps.double(), expected.logps, rtol=0, atol=rounding)
    if with_entropy:
        torch.testing.assert_close(entropy.detach().double(), expected.entropy, rtol=0, atol=2e-3)
    for name, value in grads.items():
        assert error(value, expected.grads[name]) <= 2 * rounding, name


def test_logits_beyond_the_range_of_float16(keep):
    operands, labels, grad, _ = make(16, 16, 300, torch.float16)
    with torch.no_grad():
        operands["hidden"] *= 200
        operands["weight"] *= 200
    expected = dense_result(labels=labels, grad_logps=grad, **operands)
    assert expected.logps.abs().max() > 65504
    logps, _, grads = run(operands, labels, grad, keep=keep)
    torch.testing.assert_close(logps.double(), expected.logps, rtol=1e-6, atol=0.1)
    assert all(torch.isfinite(value).all() for value in grads.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.usefixtures("small_chunks")
def test_confident_tokens_keep_their_gradient(dtype, keep):
    """1 - p from 1e-12 to 0.4: each row's dhidden is right to the rounding of its logits.

    From a rounded logp this fails: 1 - exp(logp) is 0 in float32 below 6e-8.
    """
    bar = 1e-11 if dtype == torch.float64 else 2e-5
    for row, wanted in enumerate(torch.logspace(-12, -0.4, 30, dtype=torch.float64)):
        operands, label, grad, _ = make(1, 16, 300, dtype, bias=True, seed=row)
        odds = dense_result(labels=label, **operands).miss.logit()
        with torch.no_grad():
            operands["bias"][label] += (odds - wanted.logit()).to(dtype)
        expected = dense_result(labels=label, grad_logps=grad, **operands)
        torch.testing.assert_close(expected.miss[0], wanted, rtol=1e-4, atol=0)
        logps, _, grads = run(operands, label, grad, keep=keep)
        assert error(-torch.expm1(logps.double()), expected.miss) <= bar
        assert row_error(grads["hidden"], expected.grads["hidden"]) <= bar
        assert error(grads["bias"], expected.grads["bias"]) <= bar


@pytest.mark.parametrize("gap", [-100.0, 100.0])
@pytest.mark.parametrize("label", [3, 150, 299])
@pytest.mark.usefixtures("small_chunks")
def test_the_labels_chunk_far_above_or_below_the_others(gap, label, keep):
    operands, _, grad, _ = make(8, 16, 300, bias=True)
    begin = label // 64 * 64
    with torch.no_grad():
        operands["bias"][begin : begin + 64] += gap
    labels = torch.full((8,), label)
    expected = dense_result(labels=labels, grad_logps=grad, **operands)
    logps, _, grads = run(operands, labels, grad, keep=keep)
    torch.testing.assert_close(logps.double(), expected.logps, rtol=1e-6, atol=5e-5)
    for name, value in grads.items():
        assert error(value, expected.grads[name]) <= 1e-4, name


@pytest.mark.parametrize("gap", [30.0, 1e4])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_a_label_far_below_all_others(gap, with_entropy, keep):
    """Its own probability is lost; everybody else's must not be, nor their gradients."""
    operands, labels, grad, grad_entropy = make(8, 16, 300, bias=True)
    grad_entropy = grad_entropy if with_entropy else None
    labels[:] = 7
    with torch.no_grad():
        operands["bias"][7] -= gap
    expected = dense_result(labels=labels, grad_logps=grad, grad_entropy=grad_entropy, **operands)
    logps, entropy, grads = run(operands, labels, grad, grad_entropy, keep)
    torch.testing.assert_close(logps.double(), expected.logps, rtol=1e-6, atol=0)
    if with_entropy:
        torch.testing.assert_close(entropy.detach().double(), expected.entropy, rtol=1e-5, atol=0)
    for name, value in grads.items():
        assert error(value, expected.grads[name]) <= 2e-5, name


@pytest.mark.parametrize("gap", [-30.0, -21.0, 21.0, 30.0])
def test_two_columns_in_float64_by_hand(gap):
    logps = vocab_parallel_linear_logprob(
        torch.tensor([[1.0]], dtype=torch.float64),
        torch.tensor([[0.0], [gap]], dtype=torch.float64),
        torch.tensor([0]),
    )
    # log 1 / (1 + e^gap), to all digits on either side
    expected = -math.log1p(math.exp(gap)) if gap < 0 else -gap - math.log1p(math.exp(-gap))
    assert logps.item() == pytest.approx(expected, rel=1e-15)


def test_gradient_of_the_entropy_alone():
    operands, labels, _, grad_entropy = make(20, 16, 300)
    expected = dense_result(labels=labels, grad_entropy=grad_entropy, **operands)
    _, entropy = vocab_parallel_linear_logprob(labels=labels, return_entropy=True, **operands)
    entropy.backward(grad_entropy.float())
    for name, operand in operands.items():
        assert error(operand.grad, expected.grads[name]) <= 2e-5


@pytest.mark.parametrize("kind", ["zero", "stride 0", "non-contiguous"])
def test_upstream_gradients_of_every_layout(kind, keep):
    operands, labels, grad, _ = make(20, 16, 100)
    if kind == "zero":
        _, _, grads = run(operands, labels, torch.zeros(20), keep=keep)
        assert not any(value.any() for value in grads.values())
        return
    base = torch.tensor(0.3) if kind == "stride 0" else torch.randn(40)
    grad = base.expand(20) if kind == "stride 0" else base[::2]
    expected = dense_result(labels=labels, grad_logps=grad, **operands).grads
    budget = budget_for(operands, keep)
    logps = vocab_parallel_linear_logprob(labels=labels, cache_budget_bytes=budget, **operands)
    logps.backward(grad)
    for name, operand in operands.items():
        assert error(operand.grad, expected[name]) <= 2e-5


def test_transposed_and_strided_operands(keep):
    operands, labels, grad, _ = make(20, 16, 100)
    strided = {
        "hidden": operands["hidden"].detach().T.contiguous().T.requires_grad_(),
        "weight": torch.stack([operands["weight"].detach()] * 2, 2)[..., 0].requires_grad_(),
    }
    check(strided, labels, grad, keep=keep)


def test_two_forwards_before_one_backward_and_a_weight_used_twice(keep):
    first, labels_1, grad_1, _ = make(20, 16, 100, seed=1)
    second, labels_2, grad_2, _ = make(9, 16, 100, seed=2)
    weight = first["weight"]
    logps_1, logps_2 = (
        vocab_parallel_linear_logprob(
            x["hidden"], weight, y, cache_budget_bytes=budget_for(x, keep)
        )
        for x, y in ((first, labels_1), (second, labels_2))
    )
    ((logps_1 * grad_1).sum() + (logps_2 * grad_2).sum()).backward()
    expected_1 = dense_result(labels=labels_1, grad_logps=grad_1, **first).grads
    expected_2 = dense_result(second["hidden"], weight, labels_2, grad_logps=grad_2).grads
    assert error(weight.grad, expected_1["weight"] + expected_2["weight"]) <= 2e-5
    assert error(first["hidden"].grad, expected_1["hidden"]) <= 2e-5
    assert error(second["hidden"].grad, expected_2["hidden"]) <= 2e-5


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_activation_recompute(use_reentrant, keep):
    operands, labels, grad, _ = make(20, 16, 100)
    head = functools.partial(
        vocab_parallel_linear_logprob, cache_budget_bytes=budget_for(operands, keep)
    )
    logps = checkpoint(head, *operands.values(), labels, use_reentrant=use_reentrant)
    logps.backward(grad.float())
    expected = dense_result(labels=labels, grad_logps=grad, **operands).grads
    for name, operand in operands.items():
        assert error(operand.grad, expected[name]) <= 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_inputs_give_bitwise_equal_results(dtype, keep):
    """The first step's loss is exactly ln 2 because of this: policy and reference agree in
    every bit, with and without gradient."""
    operands, labels, grad, _ = make(64, 48, 3000, dtype)
    logps, _, grads = run(operands, labels, grad, keep=keep)
    again, _, grads_again = run(operands, labels, grad, keep=keep)
    with torch.no_grad():
        reference = vocab_parallel_linear_logprob(labels=labels, **operands)
    assert torch.equal(logps, again) and torch.equal(logps, reference)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


# Largest difference of a gradient, relative to the largest value. In bfloat16 kept exponentials
# are rounded once more than computed ones.
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", list(BARS), ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.usefixtures("small_chunks")
def test_strict_and_cached_agree_to_rounding(dtype, options):
    operands, labels, grad, _ = make(37, 40, 300, dtype, bias=True)
    strict, _, expected = run(operands, labels, grad, **options)
    for keep in (0.4, 1):
        logps, _, grads = run(operands, labels, grad, keep=keep, **options)
        assert torch.equal(logps, strict)
        for name, value in grads.items():
            assert error(value, expected[name].double()) <= ROUNDING[dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", [40.0, -40.0])
@pytest.mark.usefixtures("small_chunks")
def test_logits_that_rise_or_fall_from_chunk_to_chunk(dtype, step, keep):
    """300 columns: the last chunk is 160 nats from the first, so that any one anchor of all
    chunks would overflow float32. Labels sit in every chunk."""
    operands, _, grad, _ = make(10, 16, 300, dtype, bias=True)
    with torch.no_grad():
        operands["bias"] += step * (torch.arange(300) // 64)
    labels = torch.arange(10) * 33
    expected = dense_result(labels=labels, grad_logps=grad, **operands)
    logps, _, grads = run(operands, labels, grad, keep=keep)
    torch.testing.assert_close(logps.double(), expected.logps, rtol=2e-6, atol=2e-5)
    for name, value in grads.items():
        assert error(value, expected.grads[name]) <= 5 * BARS[dtype][1], name


def peaked(n, d, v, dtype):
    """A problem with a common offset of all logits, every third token sure of its label."""
    operands, labels, grad, _ = make(n, d, v, dtype, bias=True, seed=3)
    with torch.no_grad():
        operands["bias"] += 16
        rows = operands["weight"][labels[::3]]
        wanted = torch.linspace(8, 35, len(rows))[:, None].to(dtype)
        operands["hidden"][::3] += rows * wanted / rows.square().sum(1, keepdim=True)
    return operands, labels, grad


def test_rows_of_dhidden_in_bfloat16(keep, monkeypatch):
    monkeypatch.setattr(kernels.reference, "SCRATCH_BYTES", 2**21)
    operands, labels, grad = peaked(300, 512, 2000, torch.bfloat16)
    expected = dense_result(labels=labels, grad_logps=grad, **operands)
    assert expected.miss.min() < 1e-6 and expected.miss.max() > 0.5
    hidden, weight, bias = (x.detach().double() for x in operands.values())
    largest = (hidden @ weight.T + bias).abs().amax(1)
    logps, _, grads = run(operands, labels, grad, keep=keep)
    bar = torch.where(largest <= 30, 1e-5, 2e-6 * largest)
    assert ((logps - expected.logps).abs() <= bar).all()
    assert row_errors(grads["hidden"], expected.grads["hidden"]).quantile(0.99) <= 5e-3


def test_rows_of_dhidden_in_float32_are_as_good_as_with_all_logits(keep, monkeypatch):
    monkeypatch.setattr(kernels.reference, "SCRATCH_BYTES", 2**19)
    operands, labels, grad = peaked(300, 64, 2000, torch.float32)
    expected = dense_result(labels=labels, grad_logps=grad, **operands)
    hidden, weight, bias = operands.values()
    plain = (hidden @ weight.T + bias).log_softmax(1).gather(1, labels[:, None])[:, 0]
    logps, _, grads = run(operands, labels, grad, keep=keep)
    assert error(logps, expected.logps) <= 2 * error(plain, expected.logps)
    (plain_grad,) = torch.autograd.grad(plain, hidden, grad.float())
    ours, theirs = (
        row_errors(value, expected.grads["hidden"]).quantile(0.99)
        for value in (grads["hidden"], plain_grad)
    )
    assert ours <= 2 * theirs


def test_a_token_does_not_depend_on_its_neighbours():
    operands, labels, _, _ = make(700, 48, 30000)
    alone = vocab_parallel_linear_logprob(operands["hidden"][:3], operands["weight"], labels[:3])
    among = vocab_parallel_linear_logprob(labels=labels, **operands)[:3]
    torch.testing.assert_close(alone, among, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_cuda(dtype):
    operands, labels, grad, _ = make(129, 72, 16032, dtype)
    operands = {k: v.detach().cuda().requires_grad_() for k, v in operands.items()}
    check(operands, labels.cuda(), grad.cuda())
