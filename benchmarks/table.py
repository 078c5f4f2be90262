"""The benchmarks that run_all runs, and the fields that tell their rows apart: one entry each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


def nothing() -> None:
    """It runs everywhere."""


def cuda() -> str | None:
    return None if torch.cuda.is_available() else "no CUDA device"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """`python -m benchmarks.NAME ARGUMENTS --results FOLDER`, which appends its rows to .jsonl
    files in that folder. Exit code: 0, 3 a bar was missed, else it failed."""

    name: str  # its rows say it as `benchmark`
    keys: tuple[str, ...]  # fields that name a row's case; the first is in every row
    arguments: list[str]
    quick: list[str]  # instead of them, for a run of seconds: that all works, not how fast
    limit_s: float
    needs: Callable[[], str | None] = nothing  # what this machine lacks, None: nothing
    asks: tuple[str, ...] = ()  # of run_all's options model and data, which it is given as well
    draws: bool = False  # its own figure; plot leaves its rows alone


BENCHMARKS = [
    Benchmark(name="linear_logprob", keys=("shape", "n", "dtype", "contender", "pass"),
              arguments=["--shape", "smollm2", "--tokens", "512", "2048"],
              quick=["--shape", "tiny", "--repeats", "3", "--skip", "torch-lce"], limit_s=1200),
    Benchmark(name="attention", keys=("case", "dtype", "threads", "contender"), arguments=[],
              quick=["--case", "64 short", "--threads", "1", "--repeats", "3"], limit_s=600),
    Benchmark(name="shared_prompts",
              keys=("model", "data", "precision", "pairs", "micro_batch_tokens"), arguments=[],
              quick=["--model", "tiny", "--pairs", "16", "--rounds", "2"], limit_s=1800),
    Benchmark(name="reference_store", keys=("model", "precision", "steps", "pairs_a_step"),
              arguments=[], quick=["--model", "embedded", "--steps", "3", "--rounds", "1"],
              limit_s=1800),
    Benchmark(name="data_speed", keys=("data", "rows", "tokenizer"), arguments=[],
              quick=["--rows", "2000", "--sizes", "1000", "2000"], limit_s=1200),
    Benchmark(name="startup", keys=("kind",), arguments=[], quick=["--rounds", "1"],
              limit_s=900),
    Benchmark(name="step_scaling", keys=("what", "times", "precision", "pairs", "model"),
              arguments=[], quick=["--rounds", "1", "--growth-steps", "20"], limit_s=3600,
              asks=("model", "data")),
    Benchmark(name="vs_trl", keys=("contender", "case"), arguments=[], quick=["--quick"],
              limit_s=10800, asks=("model", "data"), draws=True),
    Benchmark(name="gpu_suite", keys=(), arguments=[],  # rows of linear_logprob, and its report
              quick=["--parts", "tests", "codegen", "--budget-s", "280"], limit_s=700, needs=cuda),
]  # fmt: skip
BY_NAME = {benchmark.name: benchmark for benchmark in BENCHMARKS}
