"""Everything that needs a GPU, with one command: python -m benchmarks.gpu_suite

The gpu-marked tests, the codegen gate and the operator's benchmark on all shapes, then the
targets beside what was measured. At most 23 minutes; --parts runs some of them.
Exit code: 0, 1 a part failed (missed targets are printed, not failed), 2 no CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.measure import RESULTS, read_rows

ROOT = Path(__file__).parents[1]
# name: (arguments of python, most seconds)
PARTS = {
    "tests": (["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"], 480),
    "codegen": (["-m", "benchmarks.codegen"], 300),
    "benchmark": (["-m", "benchmarks.linear_logprob", "--device", "cuda"], 600),
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A limit for one H100, bfloat16, N = 8192."""

    shape: str
    contender: str
    pass_name: str
    key: str  # of the row: median_s or extra_bytes
    limit: float
    note: str


GIB = 2**30
TARGETS = [
    Target(shape="llama8b-131072", contender="ours-strict", pass_name="forward", key="median_s",
           limit=13.5e-3, note="best published: Liger SM90, 12.25 ms"),
    Target(shape="llama8b-131072", contender="ours-cached", pass_name="both", key="median_s",
           limit=42e-3, note="best published: Liger SM90, 50.4 ms"),
    Target(shape="llama8b-131072", contender="ours-strict", pass_name="both", key="median_s",
           limit=54e-3, note="best published: Liger SM90, 50.4 ms"),
    Target(shape="llama70b-tp8", contender="ours-cached", pass_name="both", key="median_s",
           limit=10.5e-3, note="the target has the collectives, the measurement has not"),
    Target(shape="llama70b-tp8", contender="ours-cached", pass_name="both", key="extra_bytes",
           limit=0.5 * GIB, note="with the float32 dhidden; verl 0.5 GiB, Liger-TP 1.8 GiB"),
    Target(shape="llama70b-tp8", contender="ours-strict", pass_name="both", key="extra_bytes",
           limit=0.3 * GIB, note="with the float32 dhidden"),
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="where rows are appended")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: no CUDA device; the GPU suite runs only on one (nothing was run)")
        return 2
    began = datetime.now(UTC).isoformat(timespec="seconds")
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {began}"
    print(title)
    extra = {"benchmark": ["--results", str(args.results.resolve())]}
    outcomes = {part: run_part(part, extra.get(part, [])) for part in args.parts}
    lines = summary(outcomes, rows_since(args.results, began))
    print("\n".join(lines))
    args.results.mkdir(parents=True, exist_ok=True)
    text = "\n".join([title, *lines]) + "\n"
    (args.results / "gpu_suite.txt").write_text(text, encoding="utf-8")
    return 0 if all(outcome.startswith("passed") for outcome in outcomes.values()) else 1


def run_part(part: str, extra: list[str]) -> str:
    """Runs it with its output on ours; says how it went."""
    arguments, limit_s = PARTS[part]
    print(f"\n=== {part}: python {' '.join(arguments)}", flush=True)
    # Under the interpreter nothing here would be about the GPU.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments, *extra], cwd=ROOT, env=environment, start_new_session=True
    )
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"FAILED: not done after {limit_s} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # whatever it started and left
            os.killpg(process.pid, signal.SIGKILL)
    verdict = "passed" if code == 0 else f"FAILED: exit code {code}"
    return f"{verdict} ({time.monotonic() - start:.0f} s)"


def rows_since(directory: Path, began: str) -> list[dict]:
    files = sorted(directory.glob("*.jsonl"))
    return [row for path in files for row in read_rows(path) if row["date"] >= began]


def summary(outcomes: dict[str, str], rows: list[dict]) -> list[str]:
    """Outcome of every part, then each target with the number measured beside it."""
    lines = ["", "=== summary"]
    lines += [f"{part:10} {outcomes.get(part, 'not run')}" for part in PARTS]
    lines.append("targets are for one H100, bfloat16, N=8192; measured: median")
    measured = {
        (row["shape"], row["contender"], row["pass"]): row
        for row in rows
        if row["n"] == 8192 and row["dtype"] == "bfloat16" and row["device_type"] == "cuda"
    }
    for target in TARGETS:
        row = measured.get((target.shape, target.contender, target.pass_name))
        what = f"{target.shape} {target.contender} {target.pass_name}"
        value = None if row is None else row[target.key]
        verdict = "NOT MEASURED" if value is None else "met" if value <= target.limit else "MISSED"
        lines.append(
            f"{what:42} target {_shown(target.limit, target.key):>10}"
            f"  measured {_shown(value, target.key):>10}  {verdict:12}  {target.note}"
        )
    return lines


def _shown(value: float | None, key: str) -> str:
    if value is None:
        return "-"
    return f"{1e3 * value:.2f} ms" if key == "median_s" else f"{value / GIB:.3f} GiB"


if __name__ == "__main__":
    sys.exit(main())
