"""What the torch operator promises beside its numbers: memory, who gets gradients, Megatron's
main_grad contract, global settings left alone, clear errors."""

from __future__ import annotations

from contextlib import contextmanager
from threading import Thread
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels.collectives
import kernels.gemm
import kernels.linear_logprob
import kernels.reference
from kernels import vocab_parallel_linear_logprob
from tests.ops.dense import dense_result, error
from tests.ops.memory import held_bytes, peak_bytes

N, D, V = 384, 64, 40_000  # (N, V) float32 is 58.6 MiB


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(n=20, d=16, v=100, dtype=torch.float32):
    hidden = torch.randn(n, d).to(dtype).requires_grad_()
    weight = torch.randn(v, d).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, v, (n,)), torch.randn(n)


def test_the_measure_sees_materialised_logits():
    hidden, weight, labels, _ = make(N, D, V)
    peak = peak_bytes(lambda: (hidden @ weight.T).log_softmax(1).gather(1, labels[:, None]))
    assert peak >= 2 * N * V * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["strict", "cached", "entropy"])
def test_peak_memory_is_the_scratch_the_cache_and_the_gradients(dtype, mode, monkeypatch):
    scratch = 4 * 2**20
    monkeypatch.setattr(kernels.reference, "SCRATCH_BYTES", scratch)
    hidden, weight, labels, grad = make(N, D, V, dtype)
    budget = 10 * 2**20 if mode == "cached" else 0
    options = {"return_entropy": mode == "entropy", "cache_budget_bytes": budget}

    def forward():
        out = vocab_parallel_linear_logprob(hidden, weight, labels, **options)
        return sum(out) if mode == "entropy" else out

    per_token = 64 * N * 4  # statistics, index columns and their temporaries
    copies = conversions = 0
    if dtype == torch.bfloat16:
        copies = N * D * 4  # float32 hidden
        # dz of a chunk in bfloat16, and what oneDNN copies inside a GEMM.
        conversions = scratch // 2
    with torch.no_grad():
        assert peak_bytes(forward) <= scratch + per_token + copies + conversions
    # float32 dhidden and its part of one chunk, then the gradients in the operands' types.
    grads = N * D * (4 + dtype.itemsize) + (N * D + V * D) * dtype.itemsize
    peak = peak_bytes(lambda: torch.autograd.grad(forward(), (hidden, weight), grad))
    assert peak <= budget + scratch + per_token + copies + conversions + grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("option", [{}, {"logit_softcap": 5.0}], ids=str)
def test_the_cache_holds_what_the_budget_allows(dtype, option, monkeypatch):
    monkeypatch.setattr(kernels.reference, "SCRATCH_BYTES", 2**20)
    hidden, weight, labels, _ = make(64, 32, 10_000, dtype)
    itemsize = 2 if dtype == torch.bfloat16 else 4  # float32 where g times p underflows

    def kept(budget):
        def forward():
            return vocab_parallel_linear_logprob(
                hidden, weight, labels, cache_budget_bytes=budget, **option
            )

        return held_bytes(forward)

    nothing = kept(0)
    for budget in (100_000, 1_000_000):
        assert budget - 64 * itemsize < kept(budget) - nothing <= budget
    whole = 64 * 10_000 * itemsize + 64 * 4  # and an anchor for every token
    assert kept(10**9) - nothing == kept(whole) - nothing == whole


@pytest.mark.parametrize("grads", ["none", "frozen"])
def test_without_gradients_nothing_is_kept(grads):
    hidden, weight, labels, _ = make(64, 32, 1000)
    if grads == "frozen":
        hidden.requires_grad_(False), weight.requires_grad_(False)

    def forward():
        with torch.set_grad_enabled(grads != "none"):
            return vocab_parallel_linear_logprob(hidden, weight, labels, cache_budget_bytes=10**9)

    assert held_bytes(forward) <= 64 * 4  # the result


@pytest.mark.parametrize(("mode", "expected"), [("strict", 8), ("half", 7), ("cached", 6)])
def test_flops(mode, expected):
    n, d, v = 128, 64, 24_000
    hidden, weight, labels, grad = make(n, d, v)
    budget = {"strict": 0, "half": n * v * 4 // 2, "cached": n * v * 4 + n * 4}[mode]
    with FlopCounterMode(display=False) as counter:
        logps = vocab_parallel_linear_logprob(hidden, weight, labels, cache_budget_bytes=budget)
        logps.backward(grad)
    assert counter.get_total_flops() / (n * d * v) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_second_backward_computes_again(dtype):
    """dz is made in the cache's place, so it serves only once."""
    hidden, weight, labels, grad = make(20, 16, 1000, dtype)
    logps = vocab_parallel_linear_logprob(hidden, weight, labels, cache_budget_bytes=10**6)
    first = torch.autograd.grad(logps, (hidden, weight), grad, retain_graph=True)
    second = torch.autograd.grad(logps, (hidden, weight), grad)
    strict = vocab_parallel_linear_logprob(hidden, weight, labels)
    expected = torch.autograd.grad(strict, (hidden, weight), grad)
    for a, b, c in zip(first, second, expected, strict=True):
        assert torch.equal(b, c)
        assert error(a, c.double()) <= (2e-6 if dtype == torch.float32 else 8e-3)


def head_of_smollm2(n, v):
    hidden, weight, labels, grad = make(n, 576, v, torch.bfloat16)
    return hidden, (weight.detach() / 24).requires_grad_(), labels, grad


def extra_bytes(head, hidden, weight, labels, grad):
    peak = peak_bytes(
        lambda: torch.autograd.grad(head(hidden, weight, labels), (hidden, weight), grad)
    )
    return peak - hidden.nbytes - weight.nbytes  # the gradients themselves


@pytest.mark.parametrize("budget", [0, 10 * 2**20])
def test_temporaries_at_the_benchmarks_shape(budget):
    """Its size in all but V, which adds only more chunks."""
    inputs = head_of_smollm2(2048, 8192)

    def head(*operands):
        return vocab_parallel_linear_logprob(*operands, cache_budget_bytes=budget)

    dhidden = 2048 * 576 * 4
    assert extra_bytes(head, *inputs) <= 64 * 2**20 + dhidden + budget


def test_a_quarter_of_the_memory_of_materialised_logits():
    inputs = head_of_smollm2(512, 49152)

    def materialised(hidden, weight, labels):
        return (hidden @ weight.T).float().log_softmax(1).gather(1, labels[:, None])[:, 0]

    ours = extra_bytes(vocab_parallel_linear_logprob, *inputs)
    assert ours <= 0.25 * extra_bytes(materialised, *inputs)


def test_chunks_stay_within_the_scratch():
    for n, d, itemsize, buffers in [(1, 1, 4, 1), (8192, 8192, 4, 1), (512, 576, 8, 3)]:
        width = kernels.reference.chunk_width(n, d, itemsize, buffers)
        column = itemsize * (buffers * n + 2 * d)
        assert width % 64 == 0
        assert width * column <= kernels.reference.SCRATCH_BYTES < (width + 64) * column
    assert kernels.reference.chunk_width(10**7, 8192, 4) == kernels.reference.MIN_CHUNK


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
@pytest.mark.parametrize("budget", [0, 10**6])
def test_only_what_needs_a_gradient_gets_one(frozen, budget):
    hidden, weight, labels, grad = make()
    expected = dense_result(hidden, weight, labels, grad_logps=grad).grads
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    logps = vocab_parallel_linear_logprob(hidden, weight, labels, cache_budget_bytes=budget)
    if frozen == "both":
        assert not logps.requires_grad
        return
    logps.backward(grad)
    for name, operand in (("hidden", hidden), ("weight", weight)):
        if operand.requires_grad:
            assert error(operand.grad, expected[name]) <= 2e-5
        else:
            assert operand.grad is None


def test_frozen_weight_costs_no_weight_gradient(monkeypatch):
    monkeypatch.setattr(kernels.reference, "SCRATCH_BYTES", 2**20)
    hidden, weight, labels, grad = make(64, D, V)
    weight.requires_grad_(False)

    def step():
        vocab_parallel_linear_logprob(hidden, weight, labels).backward(grad)

    assert peak_bytes(step) < V * D * 4 / 4


@pytest.mark.parametrize("return_entropy", [False, True])
def test_no_tokens_give_zero_gradients(return_entropy):
    hidden, weight, labels, _ = make(n=0)
    options = {"return_entropy": return_entropy, "cache_budget_bytes": 10**6}
    out = vocab_parallel_linear_logprob(hidden, weight, labels, **options)
    results = out if return_entropy else (out,)
    assert all(result.shape == (0,) for result in results)
    sum(result.sum() for result in results).backward()
    assert hidden.grad.shape == hidden.shape
    assert weight.grad.shape == weight.shape and not weight.grad.any()


def test_a_second_derivative_is_refused():
    hidden, weight, labels, grad = make()
    logps = vocab_parallel_linear_logprob(hidden, weight, labels)
    with pytest.raises(NotImplementedError, match="differentiable only once"):
        torch.autograd.grad(logps, hidden, grad, create_graph=True)


def megatron_hook(param):
    """What Megatron-core's DDP does after a backward (distributed_data_parallel.py,
    _make_backward_post_hook): add .grad unless the layer has done so, and drop it."""

    def hook(*_):
        assert param.grad is not None
        if not param.grad_added_to_main_grad or getattr(param, "zero_out_wgrad", False):
            param.main_grad.add_(param.grad)
        param.grad = None

    return hook


def under_megatron(weight, main_dtype):
    weight.main_grad = torch.zeros(weight.shape, dtype=main_dtype)
    weight.grad_added_to_main_grad = False
    accumulator = weight.expand_as(weight).grad_fn.next_functions[0][0]
    accumulator.register_hook(megatron_hook(weight))
    return accumulator  # keep it alive, as DDP does


@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("budget", [0, 10**6])
def test_three_micro_batches_into_main_grad(main_dtype, tied, budget, monkeypatch):
    """A tied embedding adds its own gradient through .grad, which then has to start from zero:
    poison what torch.empty_like gives to see that nothing of the placeholder gets in."""
    monkeypatch.setattr(torch, "empty_like", lambda x, **kw: torch.full_like(x, float("nan"), **kw))
    weight = torch.randn(100, 16).bfloat16().requires_grad_()
    accumulator = under_megatron(weight, main_dtype)
    if tied:
        weight.zero_out_wgrad = True
    expected = torch.zeros(100, 16, dtype=torch.float64)
    for _ in range(3):
        hidden, _, labels, grad = make(dtype=torch.bfloat16)
        logps = vocab_parallel_linear_logprob(hidden, weight, labels, cache_budget_bytes=budget)
        loss = (logps * grad).sum()
        expected += dense_result(hidden, weight, labels, grad_logps=grad).grads["weight"]
        if tied:
            tokens, upstream = torch.randint(0, 100, (30,)), torch.randn(30, 16).bfloat16()
            loss = loss + (torch.nn.functional.embedding(tokens, weight) * upstream).sum()
            expected.index_add_(0, tokens, upstream.double())
        loss.backward()
        assert weight.grad is None and weight.grad_added_to_main_grad
    assert error(weight.main_grad, expected) <= (1e-2 if main_dtype == torch.float32 else 3e-2)
    del accumulator


@pytest.mark.parametrize("budget", [0, 10**6])
def test_main_grad_is_not_rounded_to_the_weights_type(budget):
    """bfloat16 weights, float32 main_grad: one dweight differs from its bfloat16 rounding."""
    hidden, weight, labels, grad = make(dtype=torch.bfloat16)
    (plain,) = torch.autograd.grad(
        vocab_parallel_linear_logprob(hidden, weight, labels), weight, grad
    )
    accumulator = under_megatron(weight, torch.float32)
    logps = vocab_parallel_linear_logprob(hidden, weight, labels, cache_budget_bytes=budget)
    logps.backward(grad)
    # One rounding to bfloat16 is at most 2^-8 of a value; dz in between is rounded as well.
    torch.testing.assert_close(weight.main_grad, plain.float(), rtol=2**-8, atol=2e-2)
    assert not torch.equal(weight.main_grad, weight.main_grad.bfloat16().float())
    del accumulator


@pytest.fixture
def matmul():
    backend = torch.backends.mkldnn.matmul
    saved = backend.fp32_precision
    yield backend
    backend.fp32_precision = saved


def test_an_inherited_matmul_setting_is_still_inherited_afterwards(matmul):
    parent = torch.backends.mkldnn
    matmul.fp32_precision = "none"
    saved = parent.fp32_precision
    try:
        parent.fp32_precision = "bf16"
        hidden, weight, labels, _ = make()
        vocab_parallel_linear_logprob(hidden, weight, labels)
        parent.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"
    finally:
        parent.fp32_precision = saved


CUDA_SWITCHES = (
    "fp32_precision",
    "allow_bf16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction_split_k",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction_split_k",
)


@pytest.mark.parametrize("way", ["untouched", "allow_tf32", "fp32_precision"])
def test_cuda_settings_are_exact_inside_and_come_back(way):
    backend = torch.backends.cuda.matmul
    saved = backend.fp32_precision
    try:
        if way == "allow_tf32":
            backend.allow_tf32 = True
        elif way == "fp32_precision":
            backend.fp32_precision = "tf32"
        backend.allow_bf16_reduced_precision_reduction = (False, False)
        before = {name: getattr(backend, name) for name in CUDA_SWITCHES}
        with kernels.gemm._exact_cuda_matmul():
            assert backend.fp32_precision == "ieee"
            assert backend.allow_tf32 is False  # raises where torch's two switches disagree
            assert backend.allow_bf16_reduced_precision_reduction is False
        assert {name: getattr(backend, name) for name in CUDA_SWITCHES} == before
        if way == "allow_tf32":
            assert backend.allow_tf32
    finally:
        backend.allow_tf32 = False
        backend.fp32_precision = saved
        backend.allow_bf16_reduced_precision_reduction = (True, True)


@pytest.mark.parametrize("setting", ["bf16", "tf32", "ieee"])
def test_the_users_matmul_setting_neither_leaks_in_nor_is_lost(matmul, setting):
    hidden, weight, labels, grad = make(200, 64, 500)
    expected = dense_result(hidden, weight, labels, grad_logps=grad)
    matmul.fp32_precision = setting
    logps = vocab_parallel_linear_logprob(hidden, weight, labels)
    logps.backward(grad)
    assert matmul.fp32_precision == setting
    assert error(logps, expected.logps) <= 1e-6
    assert error(weight.grad, expected.grads["weight"]) <= 2e-5


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float32, torch.float32), "ieee"),
        ((torch.float16, torch.float16), "ieee"),
        ((torch.bfloat16, torch.float32), "ieee"),
        ((torch.bfloat16, torch.bfloat16), "bf16"),
    ],
    ids=str,
)
def test_bfloat16_units_multiply_bfloat16_values_only(matmul, monkeypatch, dtypes, expected):
    """On a CPU with such units the setting rounds float32 operands to bfloat16."""
    seen = set()
    add_product = kernels.reference.add_product

    def watched(out, a, b, **options):
        seen.add(matmul.fp32_precision)
        if matmul.fp32_precision == "bf16":
            assert all(torch.equal(x, x.bfloat16().to(x.dtype)) for x in (a, b))
        return add_product(out, a, b, **options)

    patch_products(monkeypatch, watched)
    hidden, weight, labels, grad = make()
    hidden = hidden.detach().to(dtypes[0]).requires_grad_()
    weight = weight.detach().to(dtypes[1]).requires_grad_()
    for budget in (0, 10**6):
        logps = vocab_parallel_linear_logprob(hidden, weight, labels, cache_budget_bytes=budget)
        logps.backward(grad)
    assert seen == {expected}


def patch_products(monkeypatch, add_product):
    for module in (kernels.reference, kernels.collectives, kernels.linear_logprob):
        monkeypatch.setattr(module, "add_product", add_product)


def test_the_matmul_setting_is_restored_after_a_failure(matmul, monkeypatch):
    def fails(*_, **__):
        raise MemoryError

    patch_products(monkeypatch, fails)
    before = matmul.fp32_precision
    hidden, weight, labels, _ = make(dtype=torch.bfloat16)
    with pytest.raises(MemoryError):
        vocab_parallel_linear_logprob(hidden, weight, labels)
    assert matmul.fp32_precision == before


def test_autocast_does_not_reach_the_operator():
    hidden, weight, labels, grad = make(20, 64, 500)
    expected = vocab_parallel_linear_logprob(hidden, weight, labels)
    expected_grads = torch.autograd.grad(expected, (hidden, weight), grad)
    with torch.autocast("cpu", torch.bfloat16):
        logps = vocab_parallel_linear_logprob(hidden, weight, labels)
        grads = torch.autograd.grad(logps, (hidden, weight), grad)
    assert torch.equal(logps, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


HIDDEN, WEIGHT, LABELS = torch.zeros(3, 4), torch.zeros(10, 4), torch.tensor([0, 5, 9])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 10, 1])}, "label 10 is outside the vocabulary of 10 ids"),
        ({"labels": torch.tensor([0, -100, 1])}, "label -100 is outside"),
        ({"labels": torch.tensor([0, 8, 1]), "vocab_size": 8}, "label 8 is outside .* of 8 ids"),
        ({"labels": torch.tensor([0, 1])}, "hidden has 3 rows; expected 2 for 2 labels"),
        ({"row_splits": [3, 0]}, r"row_splits=\[3, 0\] with 3 labels and 1 ranks"),
        ({"row_splits": [2]}, r"row_splits=\[2\] with 3 labels"),
        ({"labels": torch.zeros(3)}, "expected .* int64 or int32"),
        ({"weight": torch.zeros(10, 5)}, r"hidden \(3, 4\), weight \(10, 5\); expected \(N, D\)"),
        ({"hidden": torch.zeros(1, 3, 4)}, r"expected \(N, D\) and \(V, D\)"),
        ({"weight": torch.zeros(10, 4, dtype=torch.int64)}, "int64.*expected floating point"),
        ({"bias": torch.zeros(9)}, r"bias \(9,\); expected \(10,\)"),
        ({"vocab_size": 11}, "vocab_size=11 with 10 weight rows|vocab_size=11 .*expected"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"vocab_start": 2}, "vocab_start=2.*no tp_group"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"logit_softcap": float("inf")}, "logit_softcap=inf"),
        ({"logit_softcap": -1.0}, "logit_softcap=-1.0"),
        ({"cache_budget_bytes": -1}, "cache_budget_bytes=-1; expected an int >= 0"),
        ({"cache_budget_bytes": 1e9}, "cache_budget_bytes=1000000000.0"),
        ({"impl": "fast"}, "impl='fast'; expected 'auto', 'triton' or 'torch'"),
        ({"hidden": torch.zeros(3, 4, device="meta")}, "expected one device"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_argument_gets_a_clear_error(changes, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS} | changes
    with pytest.raises(ValueError, match=message):
        vocab_parallel_linear_logprob(**arguments)


def test_labels_are_looked_at_unless_told_not_to():
    outside = torch.tensor([0, 10, 1])
    with pytest.raises(ValueError, match="label 10 is outside"):
        vocab_parallel_linear_logprob(HIDDEN, WEIGHT, outside, check_labels=True)
    logps = vocab_parallel_linear_logprob(HIDDEN, WEIGHT, outside, check_labels=False)
    assert logps.isneginf().tolist() == [False, True, False]


def test_threads_take_turns_with_the_global_settings(matmul):
    """One in bfloat16 and one in float32: afterwards nothing of either is left."""
    matmul.fp32_precision = "ieee"
    inside, overlaps = [], []
    plain = kernels.gemm._cpu_matmul_precision

    @contextmanager
    def watched(precision):
        overlaps.append(len(inside))
        inside.append(precision)
        with plain(precision):
            yield
        inside.pop()

    def work(dtype):
        hidden, weight, labels, grad = make(64, 64, 500, dtype)
        for _ in range(20):
            vocab_parallel_linear_logprob(hidden, weight, labels).backward(grad)

    threads = [Thread(target=work, args=(dtype,)) for dtype in (torch.bfloat16, torch.float32)]
    with mock.patch.object(kernels.gemm, "_cpu_matmul_precision", watched):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(overlaps) == 80 and not any(overlaps)
    assert matmul.fp32_precision == "ieee"


def test_entropy_where_the_label_cannot_be():
    hidden, weight, _, _ = make(5, 16, 50)
    bias = torch.zeros(50)
    bias[7] = -float("inf")
    labels = torch.full((5,), 7)
    logps, entropy = vocab_parallel_linear_logprob(
        hidden, weight, labels, bias=bias, return_entropy=True
    )
    others = (hidden @ weight.T + bias).double().softmax(1)
    assert (logps == -float("inf")).all()
    expected = torch.special.entr(others).sum(1)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=0)  # float32


def test_a_placeholder_main_grad_is_no_main_grad():
    hidden, weight, labels, grad = make()
    weight.main_grad, weight.grad_added_to_main_grad = None, False
    vocab_parallel_linear_logprob(hidden, weight, labels).backward(grad)
    assert weight.grad.any() and not weight.grad_added_to_main_grad
