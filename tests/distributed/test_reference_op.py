"""The operator with its vocabulary sharded over gloo processes against the whole in float64:
backward strict and cached, every token on all ranks or each rank with its own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from kernels import vocab_parallel_linear_logprob
from tests.distributed.spawn import run_distributed
from tests.ops.dense import Result, dense_result, error, row_error

D = 16
FEATURES = {"temperature": 0.8, "logit_softcap": 4.0}
ALL = 10**6  # bytes that hold every exponential


def case(
    borders, *, n=40, dtype=torch.float64, bar=1e-12, labels_below=None, vocab_size=None,
    row_splits=None, budget=0, **options,
):  # fmt: skip
    """One sharding of one problem. `borders`: first row of each rank and the end of the last.
    `budget`: bytes of the cache, which entropy would rule out."""
    generator = torch.Generator().manual_seed(len(borders) + n)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = borders[-1]
    vocab_size = rows if vocab_size is None else vocab_size
    hidden, weight, bias = randn(n, D) / 2, randn(rows, D), randn(rows)
    weight[vocab_size:], bias[vocab_size:] = float("nan"), 1e30
    labels = torch.randint(0, labels_below or vocab_size, (n,), generator=generator)
    # First and last row of every shard is some token's label.
    edges = [i for b in borders for i in (b - 1, b) if 0 <= i < (labels_below or vocab_size)]
    labels[: min(len(edges), n)] = torch.tensor(edges[:n], dtype=torch.int64)
    grads = {"grad_logps": randn(n)} | ({} if budget else {"grad_entropy": randn(n)})
    operands = {"hidden": hidden, "weight": weight, "bias": bias}
    return {
        "borders": borders,
        "operands": {name: tensor.to(dtype) for name, tensor in operands.items()},
        "labels": labels,
        "vocab_size": vocab_size,
        "options": options,
        "grads": grads,
        "row_splits": row_splits,
        "budget": budget,
        "bar": bar,
    }


def expected_result(problem) -> Result:
    real = problem["vocab_size"]
    operands = dict(problem["operands"])
    for name in ("weight", "bias"):
        operands[name] = operands[name][:real]
    return dense_result(
        labels=problem["labels"], **operands, **problem["options"], **problem["grads"]
    )


def far_apart(borders, gap):
    """The second rank's logits lie `gap` away from all others."""
    problem = case(borders, n=30)
    problem["operands"]["bias"][borders[1] : borders[2]] += gap
    return problem


def confident(miss, budget):
    """One label that is sure to 1 - p = `miss` in float32, with its strongest rivals elsewhere."""
    problem = case([0, 30, 60], n=1, dtype=torch.float32, bar=2e-6, budget=budget)
    problem["labels"][:] = 5
    # The float64 form itself is too rough for the entropy here.
    problem["grads"].pop("grad_entropy", None)
    problem["operands"]["bias"][6:30] -= 20
    odds = expected_result(problem).miss.logit().item()
    problem["operands"]["bias"][5] += odds - math.log(miss)
    return problem


CASES = {
    2: {
        "even": case([0, 50, 100]),
        "uneven, every option": case([0, 37, 100], **FEATURES),
        "float32": case([0, 37, 100], dtype=torch.float32, bar=2e-5),
        "bfloat16": case([0, 37, 100], dtype=torch.bfloat16, bar=1e-2),
        "empty first shard": case([0, 0, 100]),
        "empty last shard": case([0, 100, 100]),
        "one row each": case([0, 1, 2]),
        "one real row": case([0, 1, 2], vocab_size=1),
        "garbage in padding": case([0, 64, 128], vocab_size=101),
        "last shard all padding": case([0, 64, 128], vocab_size=64),
        "no label on the last rank": case([0, 50, 100], labels_below=50),
        "no tokens": case([0, 50, 100], n=0),
        "second rank 100 above": far_apart([0, 50, 100], 100.0),
        "second rank 100 below": far_apart([0, 50, 100], -100.0),
        "confident 1e-12": confident(1e-12, 0),
        "confident 1e-4": confident(1e-4, 0),
        "cached": case([0, 37, 100], budget=ALL, **FEATURES),
        "half cached": case([0, 37, 100], budget=40 * 8 * 20, **FEATURES),
        "cached float32": case([0, 37, 100], dtype=torch.float32, bar=2e-5, budget=ALL),
        "cached bfloat16": case([0, 37, 100], dtype=torch.bfloat16, bar=1e-2, budget=ALL),
        "cached, empty shard": case([0, 0, 100], budget=ALL),
        "cached, no tokens": case([0, 50, 100], n=0, budget=ALL),
        "confident 1e-9": confident(1e-9, ALL),
        "rows even": case([0, 50, 100], row_splits=[20, 20]),
        "rows uneven": case([0, 37, 100], row_splits=[13, 27], **FEATURES),
        "rows on the last rank only": case([0, 50, 100], row_splits=[0, 40]),
        "rows of nobody": case([0, 50, 100], n=0, row_splits=[0, 0]),
        "rows, bfloat16": case([0, 37, 100], dtype=torch.bfloat16, bar=1e-2, row_splits=[13, 27]),
        "rows, empty shard": case([0, 0, 100], row_splits=[25, 15]),
        "rows, cached": case([0, 37, 100], row_splits=[27, 13], budget=ALL),
    },
    4: {
        "uneven": case([0, 10, 11, 64, 100], **FEATURES),
        "float32": case([0, 25, 50, 75, 100], dtype=torch.float32, bar=2e-5),
        "empty and padding": case([0, 40, 40, 80, 128], vocab_size=75),
        "no tokens": case([0, 25, 50, 75, 100], n=0),
        "cached": case([0, 10, 11, 64, 100], budget=ALL, **FEATURES),
        "rows": case([0, 10, 11, 64, 100], row_splits=[5, 0, 20, 15], **FEATURES),
        "rows, half cached": case([0, 10, 11, 64, 100], row_splits=[10] * 4, budget=40 * 8 * 20),
    },
}


def run_shard(problem, group):
    """This rank's share of a problem: results, gradients and the collectives it took."""
    rank = dist.get_rank(group)
    begin, end = problem["borders"][rank : rank + 2]
    operands, splits = dict(problem["operands"]), problem["row_splits"]
    for name in ("weight", "bias"):
        operands[name] = operands[name][begin:end]
    if splits is not None:
        operands["hidden"] = operands["hidden"].split(splits)[rank]
    operands = {name: tensor.clone().requires_grad_() for name, tensor in operands.items()}
    calls, with_entropy = [], "grad_entropy" in problem["grads"]
    with recorded_collectives(calls):
        results = vocab_parallel_linear_logprob(
            labels=problem["labels"],
            vocab_start=begin,
            vocab_size=problem["vocab_size"],
            tp_group=group,
            return_entropy=with_entropy,
            cache_budget_bytes=problem["budget"],
            row_splits=splits,
            **operands,
            **problem["options"],
        )
        results = results if with_entropy else (results,)
        calls.append("backward")
        upstream = problem["grads"].values()
        loss = sum((x * g.to(x.dtype)).sum() for x, g in zip(results, upstream))
        grads = torch.autograd.grad(loss, list(operands.values()))
    return [x.detach() for x in results], dict(zip(operands, grads)), calls


class recorded_collectives:
    def __init__(self, calls):
        self.calls = calls

    def __enter__(self):
        names = ("all_gather_single", "all_reduce", "reduce_scatter_single")
        self.saved = {name: getattr(dist, name) for name in names}
        for name, function in self.saved.items():
            setattr(dist, name, self.recording(name, function))

    def __exit__(self, *_):
        for name, function in self.saved.items():
            setattr(dist, name, function)

    def recording(self, name, function):
        def call(*args, **kwargs):
            self.calls.append(name)
            return function(*args, **kwargs)

        return call


def two_groups_side_by_side(problems):
    """tp=2 in ranks (0, 2) and (1, 3), each with a problem of its own, as in a dp=2 layout."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = dist.get_rank() % 2
    return run_shard(problems[mine], groups[mine])


def errors_of_bad_arguments():
    messages = []
    good = {"labels": torch.tensor([0]), "vocab_size": 100, "vocab_start": 50 * dist.get_rank()}
    for bad in (
        {"labels": torch.tensor([100])},
        {"vocab_size": None},
        {"vocab_start": None},
        {"row_splits": [1]},
        {"row_splits": [1, 1]},
    ):
        try:
            vocab_parallel_linear_logprob(
                torch.zeros(1, D),
                torch.zeros(50, D),
                tp_group=dist.group.WORLD,
                **(good | bad),
            )
        except ValueError as error:
            messages.append(str(error))
    return messages


def run_all(problems, side_by_side):
    """Everything of one number of ranks, so that processes start once."""
    results = {name: run_shard(problem, dist.group.WORLD) for name, problem in problems.items()}
    grouped = two_groups_side_by_side(side_by_side) if side_by_side else None
    return results, grouped, errors_of_bad_arguments()


SIDE_BY_SIDE = [case([0, 37, 100], n=40), case([0, 60, 100], n=25)]


@pytest.fixture(scope="module")
def two_ranks():
    return run_distributed(run_all, 2, CASES[2], None)


@pytest.fixture(scope="module")
def four_ranks():
    return run_distributed(run_all, 4, CASES[4], SIDE_BY_SIDE)


@pytest.fixture(params=["two_ranks", "four_ranks"])
def sharded(request):
    """(problems by name, results by rank and name)"""
    by_rank = [results for results, _, _ in request.getfixturevalue(request.param)]
    return CASES[len(by_rank)], by_rank


def test_sharded_values_and_gradients_equal_the_whole(sharded):
    problems, by_rank = sharded
    for name, problem in problems.items():
        expected, bar, real = expected_result(problem), problem["bar"], problem["vocab_size"]
        ranks = [results[name] for results in by_rank]
        results, grads, _ = ranks[0]
        atol = 1e-5 if results[0].dtype == torch.float32 else 1e-11
        for value, wanted in zip(results, (expected.logps, expected.entropy)):
            torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=atol, msg=name)
        dhidden = grads["hidden"]
        if problem["row_splits"] is not None:
            parts = [rank_grads["hidden"] for _, rank_grads, _ in ranks]
            assert [len(part) for part in parts] == problem["row_splits"], name
            dhidden = torch.cat(parts)
        assert error(dhidden, expected.grads["hidden"]) <= 10 * bar, name
        for key in ("weight", "bias"):
            whole = torch.cat([rank_grads[key] for _, rank_grads, _ in ranks])
            assert error(whole[:real], expected.grads[key]) <= 10 * bar, (name, key)
            assert not whole[real:].any(), (name, key)


def test_every_rank_has_the_same_bits(sharded):
    problems, by_rank = sharded
    for other in by_rank[1:]:
        for name, (results, grads, _) in other.items():
            first_results, first_grads, _ = by_rank[0][name]
            assert all(map(torch.equal, results, first_results)), name
            if problems[name]["row_splits"] is None:
                assert torch.equal(grads["hidden"], first_grads["hidden"]), name


def test_one_gather_forward_and_one_reduction_backward(sharded):
    problems, by_rank = sharded
    for results in by_rank:
        for name, (_, _, calls) in results.items():
            if problems[name]["row_splits"] is None:
                assert calls == ["all_gather_single", "backward", "all_reduce"], name
            else:  # the rows, then their statistics
                gathers = ["all_gather_single"] * 2
                assert calls == [*gathers, "backward", "reduce_scatter_single"], name


def test_confident_labels_keep_their_digits_across_ranks(sharded):
    problems, by_rank = sharded
    for name, problem in problems.items():
        if not name.startswith("confident"):
            continue
        expected = expected_result(problem)
        assert expected.miss.item() == pytest.approx(float(name.split()[1]), rel=1e-3)
        (logps,), grads, _ = by_rank[1][name]
        assert error(-torch.expm1(logps.double()), expected.miss) <= 2e-5
        assert row_error(grads["hidden"], expected.grads["hidden"]) <= 2e-5


def test_only_the_given_group_takes_part(four_ranks):
    for index, problem in enumerate(SIDE_BY_SIDE):
        expected = expected_result(problem)
        for rank in (index, index + 2):
            (logps, _), grads, _ = four_ranks[rank][1]
            torch.testing.assert_close(logps, expected.logps, rtol=0, atol=1e-11)
            assert error(grads["hidden"], expected.grads["hidden"]) <= 1e-11


def test_bad_arguments_raise_on_every_rank_so_nobody_waits(two_ranks):
    for _, _, (label, vocab, start, too_few_splits, too_many_rows) in two_ranks:
        assert "label 100 is outside the vocabulary of 100 ids" in label
        assert "vocab_size is None" in vocab and "vocab_start is None" in start
        assert "row_splits=[1] with 1 labels and 2 ranks" in too_few_splits
        assert "row_splits=[1, 1] with 1 labels" in too_many_rows
