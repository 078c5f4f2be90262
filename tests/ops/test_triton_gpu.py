"""The Triton operator on a GPU: sizes of real heads, memory, streams, threads, no waiting."""

from __future__ import annotations

from threading import Thread

import pytest
import torch

from kernels import linear_logprob_triton, vocab_parallel_linear_logprob
from kernels.blocks import blocks_for
from kernels.gemm import add_product
from tests.ops.dense import error
from tests.ops.triton_cases import BARS, DEVICE, EVERYTHING, check, expect, make, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device"),
]
MIB = 2**20
BUDGETS = pytest.mark.parametrize("budget", [0, 100 * MIB, EVERYTHING])


def large(dtype=torch.bfloat16, n=8192, d=4096, v=32064):
    return make(n, d, v, dtype)


@BUDGETS
@pytest.mark.parametrize("shape", [(8192, 4096, 32064), (4099, 576, 49152), (2048, 1000, 50257)])
def test_real_heads_in_bfloat16(shape, budget):
    operands, labels, grad, _ = make(*shape, torch.bfloat16)
    expected = expect(operands, labels, grad)
    logps, _, grads = run(operands, labels, grad, cache_budget_bytes=budget)
    torch.testing.assert_close(logps.double(), expected.logps, rtol=1e-6, atol=1e-5)
    right = expected.grads["hidden"]
    rows = (grads["hidden"].double() - right).norm(dim=1) / right.norm(dim=1)
    assert rows.quantile(0.99) <= 5e-3
    assert error(grads["weight"], expected.grads["weight"]) <= BARS[torch.bfloat16][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@BUDGETS
def test_other_operand_types(dtype, budget):
    operands, labels, grad, grad_entropy = make(1025, 768, 32001, dtype, bias=True)
    check(operands, labels, grad, cache_budget_bytes=budget)
    check(operands, labels, grad, grad_entropy, temperature=0.9, logit_softcap=5.0)


@pytest.mark.parametrize("d", [576, 584, 577, 4096])
def test_the_tables_own_entries(d):
    """Descriptors, pointers and unaligned rows, whatever this architecture's table says."""
    operands, labels, grad, grad_entropy = make(300, d, 5000, torch.bfloat16, bias=True)
    arch = linear_logprob_triton.architecture(torch.device(DEVICE))
    print(blocks_for(arch, d, torch.bfloat16, d, False))
    check(operands, labels, grad, cache_budget_bytes=EVERYTHING)
    check(operands, labels, grad, temperature=0.9, logit_softcap=5.0)
    check(operands, labels, grad, grad_entropy)


@BUDGETS
def test_peak_memory(budget):
    n, d, v = 8192, 4096, 32064
    operands, labels, grad, _ = large(n=n, d=d, v=v)
    grad = grad.float()

    def peak(step):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def forward():
        with torch.no_grad():
            vocab_parallel_linear_logprob(*operands.values(), labels, impl="triton")

    def both():
        logps = vocab_parallel_linear_logprob(
            *operands.values(), labels, cache_budget_bytes=budget, impl="triton"
        )
        torch.autograd.grad(logps, list(operands.values()), grad)

    both()  # compiles, and lets cuBLAS take its workspace
    statistics = 8 * n * (v // 32)  # slices of at least 32 columns
    assert peak(forward) <= 16 * n + statistics + MIB
    returned = 2 * (n * d + v * d)
    kept = min(budget, 2 * n * (v + 256) + statistics)
    assert peak(both) <= kept + 256 * MIB + 4 * n * d + returned + MIB


@BUDGETS
def test_bitwise_run_to_run_and_without_gradient(budget):
    operands, labels, grad, _ = large(n=2048)
    logps, _, grads = run(operands, labels, grad, cache_budget_bytes=budget)
    again, _, grads_again = run(operands, labels, grad, cache_budget_bytes=budget)
    with torch.no_grad():
        reference = vocab_parallel_linear_logprob(*operands.values(), labels, impl="triton")
    assert torch.equal(logps, again) and torch.equal(logps, reference)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


@BUDGETS
def test_never_waits_for_the_device(budget):
    operands, labels, grad, _ = make(300, 576, 5000, torch.bfloat16)
    run(operands, labels, grad, cache_budget_bytes=budget)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(operands, labels, grad, cache_budget_bytes=budget)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BUDGETS
def test_on_a_stream_of_its_own(budget):
    """The input is written on that stream, after a long wait: earlier reads would see zeros."""
    operands, labels, grad, _ = make(300, 576, 5000, torch.bfloat16)
    expected, _, expected_grads = run(operands, labels, grad, cache_budget_bytes=budget)
    late = {name: torch.zeros_like(x).requires_grad_() for name, x in operands.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            for name, x in late.items():
                x.copy_(operands[name])
        logps, _, grads = run(late, labels, grad, cache_budget_bytes=budget)
    stream.synchronize()
    assert torch.equal(logps, expected)
    assert all(torch.equal(grads[name], expected_grads[name]) for name in grads)


def test_from_another_thread():
    """Autograd's backward threads and data-loading ones have no current device of their own."""
    operands, labels, grad, _ = make(300, 576, 5000, torch.bfloat16)
    expected, _, expected_grads = run(operands, labels, grad)
    results = []
    thread = Thread(target=lambda: results.append(run(operands, labels, grad)))
    thread.start()
    thread.join()
    [(logps, _, grads)] = results
    assert torch.equal(logps, expected)
    assert all(torch.equal(grads[name], expected_grads[name]) for name in grads)


def test_another_number_of_tokens_compiles_nothing():
    compiled = []
    for n in (300, 301, 304, 1, 16, 1024):
        operands, labels, grad, _ = make(n, 576, 5000, torch.bfloat16)
        run(operands, labels, grad, cache_budget_bytes=EVERYTHING)
        run(operands, labels, grad)
        kernels = [getattr(linear_logprob_triton, name) for name in GEMM_KERNELS]
        compiled.append([len(kernel.device_caches[0][0]) for kernel in kernels])
    assert all(counts == compiled[0] for counts in compiled)


GEMM_KERNELS = ("linear_logprob_fwd_kernel", "linear_logprob_bwd_kernel")


def test_a_matrix_of_more_than_2_to_the_31_exponentials():
    n, v = 32768, 131072 // 2 + 64
    assert n * v > 2**31
    operands, labels, grad, _ = make(n, 64, v, torch.bfloat16)
    strict = run(operands, labels, grad)
    cached = run(operands, labels, grad, cache_budget_bytes=EVERYTHING)
    assert torch.equal(strict[0], cached[0])
    last = slice(n - 100, n)
    few = {**operands, "hidden": operands["hidden"].detach()[last].requires_grad_()}
    expected = expect(few, labels[last], grad[last])
    torch.testing.assert_close(strict[0][last].double(), expected.logps, rtol=1e-6, atol=1e-5)
    for _, _, grads in (strict, cached):
        assert error(grads["hidden"][last], expected.grads["hidden"]) <= 8e-3


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_half_products_into_float32(accumulate, transposed):
    """As dweight goes into rows of main_grad (a is dz transposed) and chunks into dhidden."""
    a = torch.randn(96, 200, device=DEVICE).bfloat16()[:, 8:136]
    a = a.t() if transposed else a
    b = torch.randn(a.shape[1], 64, device=DEVICE).bfloat16()
    whole = torch.randn(300, 64, device=DEVICE)
    out = whole[100 : 100 + len(a)]
    expected = out.double() * accumulate + a.double() @ b.double()
    untouched = whole[:100].clone()
    add_product(out, a, b, accumulate=accumulate)
    assert error(out, expected) <= 1e-6 and torch.equal(whole[:100], untouched)
