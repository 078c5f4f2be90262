"""What the torch operator promises beside its numbers: memory, who gets gradients, Megatron's
main_grad contract, global settings left alone, clear errors."""

from __future__ import annotations

import pytest
import torch

import kernels.reference
from kernels import vocab_parallel_linear_logprob
from tests.ops.dense import dense_result, error
from tests.ops.memory import peak_bytes

N, D, V = 384, 64, 40_000  # (N, V) float32 is 58.6 MiB


def make(n=20, d=16, v=100, dtype=torch.float32):
    hidden = torch.randn(n, d).to(dtype).requires_grad_()
    weight = torch.randn(v, d).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, v, (n,)), torch.randn(n)


def test_the_measure_sees_materialised_logits():
    hidden, weight, labels, _ = make(N, D, V)
    peak = peak_bytes(lambda: (hidden @ weight.T).log_softmax(1).gather(1, labels[:, None]))
    assert peak >= 2 * N * V * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("return_entropy", [False, True])
def test_peak_memory_is_the_scratch_and_the_gradients(dtype, return_entropy, monkeypatch):
    scratch = 4 * 2**20
    monkeypatch.setattr(kernels.reference, "SCRATCH_BYTES", scratch)
    hidden, weight, labels, grad = make(N, D, V, dtype)

    def forward():
        out = vocab_parallel_linear_logprob(hidden, weight, labels, return_entropy=return_entropy)
        return sum(out) if return_entropy else out

    per_token = 64 * N * 4  # statistics, index columns and their temporaries
    # On the CPU half operands are multiplied as float32 copies: hidden whole, weight by chunk.
    copies = 0 if dtype == torch.float32 else N * D * 4
    # oneDNN makes bfloat16 copies of those inside a GEMM, at most half the size.
    copies += 0 if dtype == torch.float32 else scratch // 2
    with torch.no_grad():
        assert peak_bytes(forward) <= scratch + per_token + copies
    # float32 dhidden, then the gradients in the operands' types.
    grads = N * D * 4 + (N * D + V * D) * dtype.itemsize
    peak = peak_bytes(lambda: torch.autograd.grad(forward(), (hidden, weight), grad))
    assert peak <= scratch + per_token + copies + grads


def test_chunks_stay_within_the_scratch():
    for n, d, itemsize, buffers in [(1, 1, 4, 1), (8192, 8192, 4, 1), (512, 576, 8, 3)]:
        width = kernels.reference.chunk_width(n, d, itemsize, buffers)
        held = width * itemsize * (buffers * n + 2 * d)
        assert held <= kernels.reference.SCRATCH_BYTES
        assert held + itemsize * (buffers * n + 2 * d) > kernels.reference.SCRATCH_BYTES
    assert kernels.reference.chunk_width(10**7, 8192, 4) == kernels.reference.MIN_CHUNK


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_what_needs_a_gradient_gets_one(frozen):
    hidden, weight, labels, grad = make()
    expected = dense_result(hidden, weight, labels, grad_logps=grad).grads
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    logps = vocab_parallel_linear_logprob(hidden, weight, labels)
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


def test_no_tokens_give_zero_gradients():
    hidden, weight, labels, _ = make(n=0)
    logps, entropy = vocab_parallel_linear_logprob(hidden, weight, labels, return_entropy=True)
    assert logps.shape == entropy.shape == (0,)
    (logps.sum() + entropy.sum()).backward()
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
def test_three_micro_batches_into_main_grad(main_dtype, tied, monkeypatch):
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
        logps = vocab_parallel_linear_logprob(hidden, weight, labels)
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


def test_main_grad_is_not_rounded_to_the_weights_type():
    """bfloat16 weights, float32 main_grad: one dweight differs from its bfloat16 rounding."""
    hidden, weight, labels, grad = make(dtype=torch.bfloat16)
    (plain,) = torch.autograd.grad(
        vocab_parallel_linear_logprob(hidden, weight, labels), weight, grad
    )
    accumulator = under_megatron(weight, torch.float32)
    vocab_parallel_linear_logprob(hidden, weight, labels).backward(grad)
    assert torch.equal(weight.main_grad.bfloat16(), plain)
    assert not torch.equal(weight.main_grad, plain.float())
    del accumulator


@pytest.fixture
def matmul():
    backend = torch.backends.mkldnn.matmul
    saved = backend.fp32_precision
    yield backend
    backend.fp32_precision = saved


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
    mm = kernels.reference._mm

    def watched(*args, **kwargs):
        seen.add(matmul.fp32_precision)
        return mm(*args, **kwargs)

    monkeypatch.setattr(kernels.reference, "_mm", watched)
    hidden, weight, labels, grad = make()
    hidden = hidden.detach().to(dtypes[0]).requires_grad_()
    weight = weight.detach().to(dtypes[1]).requires_grad_()
    vocab_parallel_linear_logprob(hidden, weight, labels).backward(grad)
    assert seen == {expected}


def test_the_matmul_setting_is_restored_after_a_failure(matmul, monkeypatch):
    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr(kernels.reference, "_mm", fails)
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
        ({"labels": torch.tensor([0, 1])}, r"labels \(2,\) .*; expected \(3,\)"),
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
        ({"logit_softcap": -1.0}, "logit_softcap=-1.0"),
        ({"impl": "fast"}, "impl='fast'; expected 'auto', 'triton' or 'torch'"),
        ({"hidden": torch.zeros(3, 4, device="meta")}, "expected one device"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_argument_gets_a_clear_error(changes, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS} | changes
    with pytest.raises(ValueError, match=message):
        vocab_parallel_linear_logprob(**arguments)


@pytest.mark.parametrize("changes", [{"impl": "triton"}, {"cache_budget_bytes": 1}], ids=str)
def test_what_is_not_built_yet_says_so(changes):
    with pytest.raises(NotImplementedError, match="not built yet"):
        vocab_parallel_linear_logprob(HIDDEN, WEIGHT, LABELS, **changes)
