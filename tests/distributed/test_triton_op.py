"""impl="triton" with its vocabulary sharded over gloo processes, in Triton's interpreter, against
the whole in float64 and against one process."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from kernels import linear_logprob_triton, vocab_parallel_linear_logprob
from kernels.blocks import Blocks
from tests.distributed import spawn
from tests.ops.dense import dense_result, error, row_error
from tests.ops.triton_cases import DEVICE, EVERYTHING

# numpy's: rows of a tile past the last token may hold anything, and are not stored.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
D = 16
BLOCKS = Blocks(block_n=32, block_v=32, block_d=16, slices=2, num_warps=4, num_stages=2)
PARTLY = 5000  # one block of columns of 24 tokens: 24 * (32 * 4 + 4 * 2) = 3264 bytes
BARS = {torch.float32: (1e-5, 2e-5), torch.bfloat16: (1e-5, 1e-2)}
COLLECTIVES = ("all_gather_single", "all_reduce", "reduce_scatter_single")


def case(
    borders, *, n=24, dtype=torch.float32, vocab_size=None, labels_below=None, entropy=False,
    row_splits=None, **options,
):  # fmt: skip
    """One sharding of one problem. `borders`: first row of each rank and the end of the last."""
    generator = torch.Generator().manual_seed(n)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = borders[-1]
    vocab_size = rows if vocab_size is None else vocab_size
    hidden, weight, bias = randn(n, D) / 2, randn(rows, D), randn(rows)
    weight[vocab_size:], bias[vocab_size:] = float("nan"), 1e30
    below = labels_below or vocab_size
    labels = torch.randint(0, below, (n,), generator=generator)
    # First and last row of every shard is some token's label.
    edges = [i for b in borders for i in (b - 1, b) if 0 <= i < below]
    labels[: min(len(edges), n)] = torch.tensor(edges[:n], dtype=torch.int64)
    operands = {"hidden": hidden, "weight": weight, "bias": bias}
    upstream = {"grad_logps": randn(n)} | ({"grad_entropy": randn(n)} if entropy else {})
    return {
        "borders": borders,
        "operands": {name: x.to(dtype) for name, x in operands.items()},
        "labels": labels,
        "vocab_size": vocab_size,
        "row_splits": row_splits,
        "upstream": upstream,
        "budget": options.pop("budget", 0),
        "options": options,
    }


def expected_result(problem):
    operands = dict(problem["operands"])
    for name in ("weight", "bias"):
        operands[name] = operands[name][: problem["vocab_size"]]
    labels = problem["labels"]
    return dense_result(labels=labels, **operands, **problem["options"], **problem["upstream"])


def lifted(problem, columns, by):
    problem["operands"]["bias"][columns] += by
    return problem


def confident(miss):
    """One label that is sure to 1 - p = `miss`, with its strongest rivals on the other rank."""
    problem = lifted(case([0, 30, 60], n=1), slice(6, 30), -20)
    problem["labels"][:] = 5
    odds = expected_result(problem).miss.logit().item()
    return lifted(problem, 5, odds - torch.tensor(miss, dtype=torch.float64).logit().item())


FEATURES = {"temperature": 0.8, "logit_softcap": 4.0}
CASES = {
    2: {
        "even": case([0, 50, 100]),
        "uneven, every option": case([0, 37, 100], entropy=True, **FEATURES),
        "cached": case([0, 37, 100], budget=EVERYTHING, **FEATURES),
        "partly cached": case([0, 37, 100], budget=PARTLY),
        "bfloat16": case([0, 37, 100], dtype=torch.bfloat16),
        "bfloat16 cached": case([0, 37, 100], dtype=torch.bfloat16, budget=EVERYTHING),
        "empty first shard": case([0, 0, 100], entropy=True),
        "one row each": case([0, 1, 2]),
        "one real row": case([0, 1, 2], vocab_size=1, entropy=True),
        "garbage in padding": case([0, 64, 128], vocab_size=101, budget=EVERYTHING),
        "last shard all padding": case([0, 64, 128], vocab_size=64, budget=EVERYTHING),
        "no label on the last rank": case([0, 50, 100], labels_below=50),
        "no tokens": case([0, 50, 100], n=0, entropy=True),
        "second rank 100 above": lifted(case([0, 50, 100], budget=PARTLY), slice(50, 100), 100.0),
        "second rank 100 below": lifted(case([0, 50, 100], budget=PARTLY), slice(50, 100), -100.0),
        "confident 1e-12": confident(1e-12),
        "confident 1e-4": confident(1e-4),
        "rows split evenly": case([0, 50, 100], row_splits=[12, 12]),
        "rows split unevenly": case([0, 37, 100], row_splits=[23, 1], budget=PARTLY),
        "a rank without rows": case([0, 37, 100], row_splits=[0, 24], entropy=True),
        "a rank without rows or columns": case([0, 100, 100], row_splits=[24, 0]),
        "split, bfloat16": case([0, 37, 100], row_splits=[7, 17], dtype=torch.bfloat16),
        "split, no tokens": case([0, 50, 100], n=0, row_splits=[0, 0]),
    },
    4: {
        "uneven, every option": case([0, 10, 11, 64, 100], entropy=True, **FEATURES),
        "cached": case([0, 25, 50, 75, 100], budget=EVERYTHING),
        "empty and padding": case([0, 40, 40, 80, 128], vocab_size=75),
        "no tokens": case([0, 25, 50, 75, 100], n=0),
        "rows split unevenly": case([0, 25, 50, 75, 100], row_splits=[5, 0, 16, 3], budget=PARTLY),
    },
}


def compute(problem, operands, group=None, **options):
    """(logps, entropy, gradients by name, collectives in their order) of these operands."""
    operands = {name: x.detach().clone().requires_grad_() for name, x in operands.items()}
    device, calls = operands["hidden"].device, []
    upstream = [g.to(device, torch.float32) for g in problem["upstream"].values()]
    patches = [
        mock.patch.object(dist, name, recording(name, getattr(dist, name), calls))
        for name in COLLECTIVES
    ]
    patches.append(mock.patch.object(linear_logprob_triton, "blocks_for", lambda *_: BLOCKS))
    try:
        for patch in patches:
            patch.start()
        out = vocab_parallel_linear_logprob(
            labels=problem["labels"].to(device), vocab_size=problem["vocab_size"], tp_group=group,
            return_entropy=len(upstream) > 1, cache_budget_bytes=problem["budget"], impl="triton",
            **operands, **problem["options"], **options,
        )  # fmt: skip
        outs = out if len(upstream) > 1 else (out,)
        calls.append("backward")
        loss = sum((x * g).sum() for x, g in zip(outs, upstream, strict=True))
        grads = torch.autograd.grad(loss, list(operands.values()))
    finally:
        for patch in patches:
            patch.stop()
    outs = [x.detach().cpu() for x in outs]
    return outs, {k: g.cpu() for k, g in zip(operands, grads, strict=True)}, calls


def recording(name, function, calls):
    def call(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    return call


def run_shards(problems):
    """In a spawned rank: its share of every problem."""
    rank, results = dist.get_rank(), {}
    for name, problem in problems.items():
        begin, end = problem["borders"][rank : rank + 2]
        operands, splits = dict(problem["operands"]), problem["row_splits"]
        for key in ("weight", "bias"):
            operands[key] = operands[key][begin:end]
        if splits is not None:
            operands["hidden"] = operands["hidden"].split(splits)[rank]
        results[name] = compute(
            problem, operands, dist.group.WORLD, vocab_start=begin, row_splits=splits
        )
    return results


@pytest.fixture(scope="module", params=[2, 4])
def sharded(request):
    """(problems by name, results by rank and name)"""
    if "TRITON_INTERPRET" not in os.environ:
        spawn._end_pool()  # ranks that have imported triton for the GPU
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        problems = CASES[request.param]
        return problems, spawn.run_distributed(run_shards, request.param, problems)


def test_sharded_values_and_gradients_equal_the_whole(sharded):
    problems, by_rank = sharded
    for name, problem in problems.items():
        expected, real = expected_result(problem), problem["vocab_size"]
        forward_bar, grad_bar = BARS[problem["operands"]["hidden"].dtype]
        if "100" in name:  # the rounding of logits of 100
            forward_bar, grad_bar = 5e-5, 1e-4
        ranks = [results[name] for results in by_rank]
        outs = ranks[0][0]
        for actual, right in zip(outs, (expected.logps, expected.entropy), strict=False):
            torch.testing.assert_close(
                actual.double(), right, rtol=1e-6, atol=forward_bar, msg=name
            )
        hidden = [grads["hidden"] for _, grads, _ in ranks]
        hidden = hidden[0] if problem["row_splits"] is None else torch.cat(hidden)
        assert error(hidden, expected.grads["hidden"]) <= grad_bar, name
        for key in ("weight", "bias"):
            whole = torch.cat([grads[key] for _, grads, _ in ranks])
            assert error(whole[:real], expected.grads[key]) <= grad_bar, (name, key)
            assert not whole[real:].any(), (name, key)


def test_any_number_of_ranks_gives_what_one_gives(sharded):
    problems, by_rank = sharded
    for name, problem in problems.items():
        operands = {key: x.to(DEVICE) for key, x in problem["operands"].items()}
        outs, grads, _ = compute(problem, operands)
        for rank, results in enumerate(by_rank):
            for actual, one in zip(results[name][0], outs, strict=True):
                torch.testing.assert_close(actual, one, rtol=1e-6, atol=1e-5, msg=name)
            hidden, splits = grads["hidden"], problem["row_splits"]
            hidden = hidden if splits is None else hidden.split(splits)[rank]
            begin, end = problem["borders"][rank : rank + 2]
            mine = {"hidden": hidden, "weight": grads["weight"][begin:end]}
            half = hidden.dtype == torch.bfloat16
            for key, one in mine.items():
                actual = results[name][1][key]
                scale = float(grads[key].abs().max()) if grads[key].numel() else 0.0
                bar = (1e-2 if half else 1e-5) * scale
                torch.testing.assert_close(actual, one, rtol=0, atol=bar, msg=f"{name} {key}")


def test_every_rank_has_the_same_bits(sharded):
    problems, by_rank = sharded
    for results in by_rank[1:]:
        for name, (outs, grads, _) in results.items():
            first_outs, first_grads, _ = by_rank[0][name]
            assert all(torch.equal(a, b) for a, b in zip(outs, first_outs, strict=True)), name
            if problems[name]["row_splits"] is None:
                assert torch.equal(grads["hidden"], first_grads["hidden"]), name


def test_each_rank_joins_every_collective_once(sharded):
    """Also one without tokens, rows, columns or labels; dhidden is summed once, after all of it."""
    problems, by_rank = sharded
    for results in by_rank:
        for name, (_, _, calls) in results.items():
            if problems[name]["row_splits"] is None:
                assert calls == ["all_gather_single", "backward", "all_reduce"], name
            else:
                gathers = ["all_gather_single"] * 2  # rows, statistics
                assert calls == [*gathers, "backward", "reduce_scatter_single"], name


def test_confident_labels_keep_their_digits_across_ranks(sharded):
    problems, by_rank = sharded
    for name in (name for name in problems if name.startswith("confident")):
        expected = expected_result(problems[name])
        assert expected.miss.item() == pytest.approx(float(name.split()[1]), rel=1e-3)
        (logps,), grads, _ = by_rank[1][name]
        assert error(-torch.expm1(logps.double()), expected.miss) <= 2e-5
        assert row_error(grads["hidden"], expected.grads["hidden"]) <= 2e-5
