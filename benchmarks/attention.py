"""Speed of packed attention on a CPU beside a loop of scaled_dot_product_attention calls.

    python -m benchmarks.attention [--case NAME ...] [--dtype NAME ...] [--threads N ...]

9 query and 3 key-value heads of size 64, forward and backward, without rope. The two take turns.
Nothing is timed before ours has passed its check against float64 on the same tensors. Rows are
appended to benchmarks/results/attention. Exit code: 0, 1 wrong results (no speed is printed), 3 a
bar was missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import RESULTS, append_rows, cpu_flags, machine, statistics, take_turns
from reinforcer_tp.mcore.grouped_attention import grouped_attention
from reinforcer_tp.mcore.segments import group_segments

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
FORMULA = (
    "GFLOP/s: 12 H E for each query and key it sees (2 products forward, 4 backward), over the "
    "median time; padding, hidden pairs and what is computed again are not counted."
)
# Least time of the loop over ours, by case and dtype. Long segments take the same SDPA calls as the
# loop's: no slower, within what timing can tell.
BARS = {
    ("64 short", "bfloat16"): 3.0,
    ("64 short", "float32"): 1.6,
    ("4 x 1024", "bfloat16"): 0.95,
    ("4 x 1024", "float32"): 0.95,
}
# Norm of ours' error over the loop's, of the output and each gradient.
ERROR_BAR = 1.5


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Borders of the queries and keys of each segment, and the rows of the keys."""

    cu_q: list[int]
    cu_kv: list[int]
    kv_index: Tensor | None

    def num_visible(self) -> int:
        """(query, key) pairs, causal and aligned at the end."""
        pairs = zip(pairwise(self.cu_q), pairwise(self.cu_kv), strict=True)
        sizes = ((b - a, d - c) for (a, b), (c, d) in pairs)
        return sum(n * m - n * (n - 1) // 2 for n, m in sizes)


def alone(lengths: list[int]) -> Segments:
    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return Segments(cu_q=borders, cu_kv=borders, kv_index=None)


def shared_pairs(pairs: list[tuple[int, int, int]]) -> Segments:
    """prompt|chosen and rejected of each (P, C, R); the second also sees the prompt's keys."""
    cu_q, cu_kv, rows = [0], [0], []
    for prompt, chosen, rejected in pairs:
        start, middle = cu_q[-1], cu_q[-1] + prompt + chosen
        cu_q += [middle, middle + rejected]
        cu_kv += [cu_kv[-1] + prompt + chosen, cu_kv[-1] + 2 * prompt + chosen + rejected]
        rows += [*range(start, middle), *range(start, start + prompt)]
        rows += range(middle, middle + rejected)
    return Segments(cu_q=cu_q, cu_kv=cu_kv, kv_index=torch.tensor(rows))


def make_cases() -> dict[str, Segments]:
    generator = torch.Generator().manual_seed(0)

    def lengths(*shape: int) -> Tensor:
        return torch.randint(30, 91, shape, generator=generator)

    return {
        "64 short": alone(lengths(64).tolist()),
        "21 pairs": shared_pairs([(40, c, r) for c, r in lengths(21, 2).tolist()]),
        "4 x 1024": alone([1024] * 4),
        "2 long pairs": shared_pairs([(512, 300, 500), (700, 400, 200)]),
    }


def loop_of_sdpa(segments: Segments) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One call a segment, written as one would; its masks are made once."""
    parts = []
    for (a, b), (c, d) in zip(pairwise(segments.cu_q), pairwise(segments.cu_kv), strict=True):
        n, m = b - a, d - c
        mask = None if n == m else torch.ones(n, m, dtype=torch.bool).tril(m - n)
        parts.append((slice(a, b), slice(c, d), mask))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if segments.kv_index is not None:
            k, v = k[segments.kv_index], v[segments.kv_index]
        outs = []
        for queries, keys, mask in parts:
            # (1, heads, tokens, E): without the 1 it does not take its flash form
            by_head = (x.transpose(0, 1)[None] for x in (q[queries], k[keys], v[keys]))
            out = F.scaled_dot_product_attention(
                *by_head, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    return attend


def ours(segments: Segments) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    cu_q, cu_kv = (torch.tensor(cu, dtype=torch.int32) for cu in (segments.cu_q, segments.cu_kv))
    heads = {"num_heads": HEADS, "num_kv_heads": KV_HEADS}
    plan = group_segments(cu_q, cu_kv, segments.kv_index, **heads)
    return lambda q, k, v: grouped_attention(q, k, v, plan)


def make_inputs(segments: Segments, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """((q, k, v), gradient of the output)."""
    generator = torch.Generator().manual_seed(1)
    tokens = segments.cu_q[-1]
    q, k, v, grad = (
        torch.randn(tokens, heads, HEAD_DIM, generator=generator).to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    return [x.requires_grad_() for x in (q, k, v)], grad


def step(attend: Callable, tensors: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward: output, dq, dk, dv."""
    out = attend(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


def errors(attend: Callable, segments: Segments, dtype: torch.dtype) -> list[float]:
    """||error|| / ||exact|| of output, dq, dk and dv; exact is the loop in float64."""
    tensors, grad = make_inputs(segments, dtype)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    exact = step(loop_of_sdpa(segments), wide, grad.double())
    results = step(attend, tensors, grad)
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(results, exact, strict=True)]


def run_case(name: str, segments: Segments, dtype: str, repeats: int) -> tuple[list[dict], bool]:
    """(a row a contender, whether the results were right); prints the line of the table."""
    contenders = {"sdpa loop": loop_of_sdpa(segments), "ours": ours(segments)}
    wrong = {key: errors(fn, segments, DTYPES[dtype]) for key, fn in contenders.items()}
    worst = max(a / b for a, b in zip(wrong["ours"], wrong["sdpa loop"], strict=True))
    if not worst <= ERROR_BAR:
        print(
            f"  {name} {dtype}: WRONG RESULTS: error {worst:.2f} of the loop's, {wrong}; no speed"
        )
        return [], False
    inputs = make_inputs(segments, DTYPES[dtype])
    ways = {key: partial(step, attend, *inputs) for key, attend in contenders.items()}
    samples = take_turns(ways, repeats)
    rows = [
        {"benchmark": "attention", "case": name, "dtype": dtype, "contender": key}
        | {"tokens": segments.cu_q[-1], "segments": len(segments.cu_q) - 1, "errors": wrong[key]}
        | statistics(samples[key])
        for key in contenders
    ]
    speedup = rows[0]["median_s"] / rows[1]["median_s"]
    for row in rows:
        row["gflops"] = 12 * HEADS * HEAD_DIM * segments.num_visible() / row["median_s"] / 1e9
        row["speedup"] = rows[0]["median_s"] / row["median_s"]
    print_row(rows, speedup, worst)
    return rows, True


def print_row(rows: list[dict], speedup: float, error: float) -> None:
    loop, mine = rows
    bar = BARS.get((mine["case"], mine["dtype"]))
    verdict = "" if bar is None else f"bar {bar}: {'PASS' if speedup >= bar else 'FAIL'}"
    print(
        f"  {mine['case']:14}{mine['dtype']:10}{torch.get_num_threads():4}"
        f"{1e3 * loop['median_s']:10.1f}{1e3 * mine['median_s']:10.1f}"
        f"{loop['gflops']:9.1f}{mine['gflops']:9.1f}{error:9.2f}{speedup:9.2f}  {verdict}"
    )


def missed(rows: list[dict]) -> bool:
    bars = [(row, BARS.get((row["case"], row["dtype"]), 0)) for row in rows]
    return any(row["contender"] == "ours" and row["speedup"] < bar for row, bar in bars)


def main(argv: list[str] | None = None) -> int:
    cases = make_cases()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--case", nargs="+", choices=cases, default=list(cases))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15, help="rounds, each runs both once")
    parser.add_argument("--results", type=Path, default=RESULTS / "attention")
    args = parser.parse_args(argv)
    print(f"{FORMULA}\nerror: norm of ours over the loop's, worst of output and gradients")
    print(f"  {cpu_flags()}; times in ms, medians of {args.repeats}")
    print(
        f"  {'case':14}{'dtype':10}{'thr':>4}{'loop':>10}{'ours':>10}{'GFLOP/s':>9}{'ours':>9}"
        f"{'error':>9}{'speedup':>9}"
    )
    all_right, all_rows = True, []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype in args.dtype:
            for name in args.case:
                rows, is_right = run_case(name, cases[name], dtype, args.repeats)
                all_right &= is_right
                all_rows += [machine("cpu") | row for row in rows]
    if all_rows:
        print(f"  appended to {append_rows(args.results, all_rows)}")
    return 1 if not all_right else 3 if missed(all_rows) else 0


if __name__ == "__main__":
    sys.exit(main())
