"""The Triton operator under autograd: upstream gradients, accumulation, recompute, what is kept,
equal bits, and bad input."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import linear_logprob_triton, vocab_parallel_linear_logprob
from tests.ops.dense import dense_result, error
from tests.ops.triton_cases import (
    DEVICE,
    EVERYTHING,
    budget_of,
    check,
    expect,
    make,
    poisoned_memory,  # noqa: F401 - applies to every test
    recorded_launches,
    run,
    small_tiles,  # noqa: F401
)

pytestmark = pytest.mark.usefixtures("small_tiles")
PARTLY = budget_of(2, 20)
BUDGETS = pytest.mark.parametrize("budget", [0, EVERYTHING, PARTLY])


def logprob(*args, **options):
    return vocab_parallel_linear_logprob(*args, impl="triton", **options)


@BUDGETS
@pytest.mark.parametrize("kind", ["zero", "stride 0", "non-contiguous", "one row"])
def test_upstream_gradients_of_every_layout(kind, budget):
    operands, labels, _, _ = make(20, 16, 200)
    grad = {
        "zero": torch.zeros(20, device=DEVICE),
        "stride 0": torch.tensor(-0.3, device=DEVICE).expand(20),
        "non-contiguous": torch.randn(40, device=DEVICE)[::2],
        "one row": torch.eye(20, device=DEVICE)[7] * 1e-30,
    }[kind]
    expected = expect(operands, labels, grad).grads
    logps = logprob(*operands.values(), labels, cache_budget_bytes=budget)
    logps.backward(grad)
    for name, operand in operands.items():
        assert error(operand.grad, expected[name]) <= 2e-5
        assert torch.isfinite(operand.grad).all()
        if kind == "zero":
            assert not operand.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_strict_cached_and_partly_cached_agree(dtype):
    operands, labels, grad, _ = make(20, 32, 260, dtype, bias=True)
    itemsize = 2 if dtype == torch.bfloat16 else 4
    strict = run(operands, labels, grad)
    for budget in (budget_of(1, 20, itemsize=itemsize) - 1, PARTLY, EVERYTHING):
        logps, _, grads = run(operands, labels, grad, cache_budget_bytes=budget)
        assert torch.equal(logps, strict[0])
        for name, value in grads.items():
            # bfloat16 E is rounded, then dz again; else only the order of two products differs.
            bar = 6e-3 if dtype == torch.bfloat16 else 1e-3 if dtype == torch.float16 else 1e-6
            assert error(value, strict[2][name].double()) <= bar, name


@BUDGETS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_inputs_give_bitwise_equal_results(dtype, budget):
    """The first step's loss is exactly ln 2 because of this: policy and reference agree in
    every bit, with and without gradient."""
    operands, labels, grad, _ = make(20, 48, 260, dtype)
    logps, _, grads = run(operands, labels, grad, cache_budget_bytes=budget)
    again, _, grads_again = run(operands, labels, grad, cache_budget_bytes=budget)
    with torch.no_grad():
        reference = logprob(*operands.values(), labels, cache_budget_bytes=budget)
    assert torch.equal(logps, again) and torch.equal(logps, reference)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


def test_a_token_does_not_depend_on_its_neighbours():
    operands, labels, _, _ = make(100, 48, 300)
    alone = logprob(operands["hidden"][:3], operands["weight"], labels[:3])
    among = logprob(*operands.values(), labels)[:3]
    assert torch.equal(alone, among)


def test_nothing_is_kept_without_a_gradient_to_come():
    operands, labels, grad, grad_entropy = make(20, 16, 200)
    with recorded_launches() as launches:
        with torch.no_grad():
            logprob(*operands.values(), labels, cache_budget_bytes=EVERYTHING)
        frozen = [x.detach() for x in operands.values()]
        logprob(*frozen, labels, cache_budget_bytes=EVERYTHING)
        run(operands, labels, grad, grad_entropy, cache_budget_bytes=EVERYTHING)
        logprob(*operands.values(), labels, cache_budget_bytes=PARTLY)
    stored = [flags["STORE_E"] for _, _, flags in launches["linear_logprob_fwd_kernel"]]
    assert stored == [False, False, False, True]


@BUDGETS
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_what_needs_a_gradient_gets_one(frozen, budget):
    operands, labels, grad, _ = make(20, 16, 200, bias=True)
    expected = expect(operands, labels, grad).grads
    operands[frozen] = operands[frozen].detach()
    logprob(
        operands["hidden"], operands["weight"], labels, bias=operands["bias"],
        cache_budget_bytes=budget,
    ).backward(grad.float())  # fmt: skip
    assert operands[frozen].grad is None
    for name in operands.keys() - {frozen}:
        assert error(operands[name].grad, expected[name]) <= 2e-5


@BUDGETS
def test_a_second_backward_over_the_same_graph(budget):
    """The first one makes dz in the cache's place, so the second has to multiply again."""
    operands, labels, grad, other = make(20, 16, 200)
    logps = logprob(*operands.values(), labels, cache_budget_bytes=budget)
    for upstream in (grad, other):
        expected = expect(operands, labels, upstream).grads
        inputs = list(operands.values())
        grads = torch.autograd.grad(logps, inputs, upstream.float(), retain_graph=True)
        for name, value in zip(operands, grads, strict=True):
            assert error(value, expected[name]) <= 2e-5, name


@BUDGETS
def test_two_forwards_before_one_backward_and_a_weight_used_twice(budget):
    first, labels_1, grad_1, _ = make(20, 16, 200, seed=1)
    second, labels_2, grad_2, _ = make(9, 16, 200, seed=2)
    weight = first["weight"]
    logps_1 = logprob(first["hidden"], weight, labels_1, cache_budget_bytes=budget)
    logps_2 = logprob(second["hidden"], weight, labels_2, cache_budget_bytes=budget)
    ((logps_1 * grad_1).sum() + (logps_2 * grad_2).sum()).backward()
    expected_1 = expect(first, labels_1, grad_1).grads
    expected_2 = dense_result(second["hidden"], weight, labels_2, grad_logps=grad_2).grads
    assert error(weight.grad, expected_1["weight"] + expected_2["weight"]) <= 2e-5
    assert error(first["hidden"].grad, expected_1["hidden"]) <= 2e-5
    assert error(second["hidden"].grad, expected_2["hidden"]) <= 2e-5


@BUDGETS
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_activation_recompute(budget, use_reentrant):
    operands, labels, grad, _ = make(20, 16, 200)

    def head(hidden, weight):
        return logprob(hidden * 1.0, weight, labels, cache_budget_bytes=budget)

    logps = checkpoint(head, *operands.values(), use_reentrant=use_reentrant)
    logps.backward(grad.float())
    expected = expect(operands, labels, grad).grads
    for name, operand in operands.items():
        assert error(operand.grad, expected[name]) <= 2e-5


def add_to_main_grad(weight):
    """What Megatron-core's DDP does after a backward (distributed_data_parallel.py,
    _make_backward_post_hook): add .grad unless the layer has done so, and drop it."""

    def hook(_):
        if not weight.grad_added_to_main_grad or getattr(weight, "zero_out_wgrad", False):
            weight.main_grad.add_(weight.grad)
        weight.grad = None

    weight.main_grad = torch.zeros(weight.shape, device=DEVICE)
    weight.grad_added_to_main_grad = False
    weight.register_post_accumulate_grad_hook(hook)


@BUDGETS
@pytest.mark.parametrize("tied", [False, True])
def test_three_micro_batches_into_a_float32_main_grad(tied, budget):
    """A tied embedding adds its own gradient through .grad, which then has to start from zero."""
    weight = make(1, 16, 200, torch.bfloat16)[0]["weight"]
    add_to_main_grad(weight)
    if tied:
        weight.zero_out_wgrad = True
    expected = torch.zeros(200, 16, dtype=torch.float64, device=DEVICE)
    for seed in range(3):
        operands, labels, grad, _ = make(20, 16, 200, torch.bfloat16, seed=seed)
        operands["weight"] = weight
        logps = logprob(*operands.values(), labels, cache_budget_bytes=budget)
        loss = (logps * grad).sum()
        expected += expect(operands, labels, grad).grads["weight"]
        if tied:
            tokens = torch.arange(30, device=DEVICE)
            upstream = torch.randn(30, 16, device=DEVICE).bfloat16()
            loss = loss + (torch.nn.functional.embedding(tokens, weight) * upstream).sum()
            expected.index_add_(0, tokens, upstream.double())
        loss.backward()
        assert weight.grad is None and weight.grad_added_to_main_grad
    assert error(weight.main_grad, expected) <= 1e-2


def test_a_second_derivative_is_refused():
    operands, labels, grad, _ = make(20, 16, 200)
    logps = logprob(*operands.values(), labels)
    with pytest.raises(NotImplementedError, match="differentiable only once"):
        torch.autograd.grad(logps, operands["hidden"], grad.float(), create_graph=True)


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_float64_is_refused_by_name(name):
    operands, labels, _, _ = make(4, 16, 200)
    operands[name] = operands[name].detach().double()
    with pytest.raises(NotImplementedError, match=r"float64.*use impl='torch'"):
        logprob(*operands.values(), labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 10, 1])}, "label 10 is outside the vocabulary of 10 ids"),
        ({"labels": torch.tensor([0, 8, 1]), "vocab_size": 8}, "label 8 is outside .* of 8 ids"),
        ({"labels": torch.tensor([0, 1])}, "hidden has 3 rows; expected 2 for 2 labels"),
        ({"weight": torch.zeros(10, 5)}, r"hidden \(3, 4\), weight \(10, 5\); expected \(N, D\)"),
        ({"bias": torch.zeros(9)}, r"bias \(9,\); expected \(10,\)"),
        ({"cache_budget_bytes": -1}, "cache_budget_bytes=-1; expected an int >= 0"),
        ({"cache_budget_bytes": 1.5}, "cache_budget_bytes=1.5; expected an int >= 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_argument_gets_a_clear_error_and_no_launch(changes, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(10, 4)} | changes
    arguments.setdefault("labels", torch.tensor([0, 5, 9]))
    arguments = {k: x.to(DEVICE) if torch.is_tensor(x) else x for k, x in arguments.items()}
    with recorded_launches() as launches, pytest.raises(ValueError, match=message):
        logprob(**arguments, check_labels=True)
    assert not any(launches.values())


def test_without_a_gpu_or_the_interpreter_it_says_how_to_run():
    """In a fresh process, since triton reads TRITON_INTERPRET when it defines the kernels."""
    code = (
        "import torch; from kernels import vocab_parallel_linear_logprob as op\n"
        "try: op(torch.zeros(1, 8), torch.zeros(4, 8), torch.tensor([0]), impl='triton')\n"
        "except ValueError as error: print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert "impl='triton' with tensors on cpu; expected CUDA" in out.stdout, out.stderr
    assert "impl='auto'" in out.stdout and "TRITON_INTERPRET=1" in out.stdout


def test_no_tokens_launch_nothing_and_give_zero_gradients():
    operands, labels, grad, grad_entropy = make(0, 16, 200, bias=True)
    with recorded_launches() as launches:
        check(operands, labels, grad, cache_budget_bytes=EVERYTHING)
        _, _, grads = run(operands, labels, grad, grad_entropy)
    assert not any(launches.values())
    assert all(grads[name].shape == x.shape for name, x in operands.items())
    assert not any(value.any() for value in grads.values())


def test_the_interpreter_is_used_only_without_a_gpu():
    is_interpreted = linear_logprob_triton.INTERPRETED
    assert is_interpreted == (DEVICE == "cpu")
