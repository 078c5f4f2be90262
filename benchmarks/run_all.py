"""Every benchmark that this machine can run, and one file of what they found.

    python -m benchmarks.run_all [--quick] [--only NAME ...] [--skip NAME ...] [--model FOLDER]
                                 [--data FILE]

Each in a process of its own with a time limit; one that fails is recorded and the others still run.
After each benchmarks/results/runs/<device>-<date>.json has all that is known: machine, versions,
commit, and by benchmark its rows, verdict and seconds. benchmarks.plot draws it, benchmarks.compare
compares two. --quick: small cases in a minute or two, to see that all works.
Exit code: 0, 1 a benchmark failed, missed a bar of its own (not with --quick) or none was run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.measure import RESULTS, read_rows, slug
from benchmarks.suite_parts import Outcome, Part, run_part, stop_with_parts
from benchmarks.suite_report import about_machine
from benchmarks.table import BENCHMARKS, BY_NAME, Benchmark
from reinforcer_tp.whole_files import write_whole

MISSED = "missed: a bar of its own"


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    stop_with_parts()
    chosen = [b for b in BENCHMARKS if b.name in args.only and b.name not in args.skip]
    machine, start = about_machine(), time.monotonic()
    stem = f"{slug(str(machine['device']))}-{datetime.now(UTC):%Y-%m-%d-%H%M%S}"
    path = args.results.resolve() / "runs" / f"{stem}.json"
    outcomes = {benchmark.name: Outcome(verdict="not run: not yet") for benchmark in chosen}
    with tempfile.TemporaryDirectory(prefix="run_all-", ignore_cleanup_errors=True) as work:
        for benchmark in chosen:
            outcomes[benchmark.name] = run(benchmark, Path(work, benchmark.name), args)
            write(path, machine, args.quick, time.monotonic() - start, outcomes)
    print()
    for name, outcome in outcomes.items():
        print(f"{name:16} {outcome.seconds:7.1f} s  {outcome.verdict}")
    print(f"written: {path}" if chosen else "nothing was chosen")
    verdicts = [outcome.verdict for outcome in outcomes.values()]
    failed = any(v.startswith("FAILED") or (v == MISSED and not args.quick) for v in verdicts)
    return 1 if failed or all(v.startswith("not run") for v in verdicts) else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run_all",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=BY_NAME, default=list(BY_NAME))
    parser.add_argument("--skip", nargs="+", choices=BY_NAME, default=[])
    parser.add_argument("--quick", action="store_true", help="small cases, whose bars say nothing")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder, for those that ask")
    parser.add_argument("--data", type=Path, help="a file of pairs, for those that ask")
    parser.add_argument("--limit-s", type=float, help="of each (default: its own)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file goes to its runs/")
    return parser.parse_args(argv)


def run(benchmark: Benchmark, folder: Path, args: argparse.Namespace) -> Outcome:
    """Runs it with `folder` for its rows, which are in the outcome also where it failed later."""
    missing = [f"no --{name}" for name in benchmark.asks if getattr(args, name) is None]
    if lacking := benchmark.needs() or ", ".join(missing):
        return Outcome(verdict=f"not run: {lacking}")
    arguments = [*(benchmark.quick if args.quick else benchmark.arguments)]
    for name in benchmark.asks:
        arguments += [f"--{name}", str(getattr(args, name).resolve())]
    part = Part(
        name=benchmark.name,
        arguments=["-m", f"benchmarks.{benchmark.name}", *arguments, "--results", str(folder)],
        limit_s=args.limit_s or benchmark.limit_s,
        read=lambda _: found_in(folder),
    )
    outcome = run_part(part, part.limit_s)
    if outcome.verdict == "FAILED: exit code 3":
        outcome.verdict = MISSED
    return outcome


def found_in(folder: Path) -> dict:
    """Rows that were appended, and reports beside them by file name."""
    rows = [row for path in sorted(folder.rglob("*.jsonl")) for row in read_rows(path)]
    reports = {path.name: json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))}
    return {
        "rows": rows,
        "reports": reports,
        "wrong": [] if rows or reports else ["it left no rows"],
    }


def write(
    path: Path, machine: dict, quick: bool, seconds: float, outcomes: dict[str, Outcome]
) -> None:
    parts = {name: asdict(outcome) for name, outcome in outcomes.items()}
    report = {"machine": machine, "quick": quick, "seconds": round(seconds, 1), "parts": parts}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
