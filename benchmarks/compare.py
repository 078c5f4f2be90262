"""Whether one result file is slower or uses more memory than another.

    python -m benchmarks.compare OLD NEW [--tolerance 0.1] [--across-machines]

Files of rows (.jsonl) or reports (.json) of run_all and gpu_suite; of each case the newest row. A
case is worse when its median is by more than the tolerance and the 20th to 80th percentiles of old
and new do not overlap. Contenders that are not ours tell how fast the machine was; they are shown
and do not count.
Exit code: 0, 1 something is worse or a benchmark fails that did not, 2 a file is damaged, the
files have no case in common, or they are of different machines.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import Measured, Results, measured, newest, read_results

SAME = ("device", "cpu_flags", "torch", "threads")  # else times cannot be compared
WORSE = {"s": "SLOWER", "1/s": "SLOWER", "bytes": "MORE MEMORY"}
BETTER = {"s": "faster", "1/s": "faster", "bytes": "less memory"}
FORMATS = {"s": ("ms", 1e-3), "bytes": ("MiB", 2**20), "1/s": ("/s", 1)}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    case: str
    what: str
    old: Measured
    new: Measured
    is_ours: bool

    @property
    def ratio(self) -> float:
        """new / old"""
        if self.old.value == self.new.value:
            return 1.0
        return self.new.value / self.old.value if self.old.value else float("inf")

    def verdict(self, tolerance: float) -> str:
        """SLOWER and MORE MEMORY are regressions."""
        limit = 1 + tolerance
        if 1 / limit <= self.ratio <= limit:
            return ""
        if max(self.old.low, self.new.low) <= min(self.old.high, self.new.high):
            return "noise"
        is_worse = (self.ratio > 1) != (self.old.unit == "1/s")
        if not is_worse:
            return BETTER[self.old.unit]
        return WORSE[self.old.unit] if self.is_ours else "not ours: worse"


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    try:
        old, new = read_results(args.old), read_results(args.new)
    except ValueError as error:
        print(f"error: {error}")
        return 2
    before, after = newest(old.rows), newest(new.rows)
    common = [case for case in after if case in before]
    if not common:
        print(f"error: {args.old} and {args.new} have no case in common")
        return 2
    differing = differences([(before[case], after[case]) for case in common])
    for line in differing:
        print(f"warning: {line}")
    if differing and not args.across_machines:
        print("error: times of different machines; --across-machines compares them nevertheless")
        return 2
    compared = [line for case in common for line in compare(case, before[case], after[case])]
    print_table(compared, args.tolerance)
    for path, cases, others in ((args.old, before, after), (args.new, after, before)):
        for case in cases:
            if case not in others:
                print(f"only in {path}: {name_of(case)}")
    return conclude(compared, newly_failing(old, new), args.tolerance)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="share, default 0.1: 10 %%")
    parser.add_argument("--across-machines", action="store_true", help="also of different ones")
    args = parser.parse_args(argv)
    if not args.tolerance >= 0:
        parser.error(f"--tolerance {args.tolerance}; expected at least 0")
    return args


def differences(pairs: list[tuple[dict, dict]]) -> list[str]:
    """What rows of one case say about different machines, each difference once."""
    found = {
        f"{field} differs: {json.dumps(old.get(field))} and {json.dumps(new.get(field))}": None
        for old, new in pairs
        for field in SAME
        if old.get(field) != new.get(field)
    }
    return list(found)


def compare(case: tuple, old: dict, new: dict) -> list[Comparison]:
    """All that both rows of a case measured."""
    before, after = measured(old), measured(new)
    return [
        Comparison(
            case=name_of(case),
            what=what,
            old=before[what],
            new=after[what],
            is_ours=str(new.get("contender", "ours")).startswith("ours"),
        )
        for what in after
        if what in before
    ]


def name_of(case: tuple) -> str:
    return " ".join(map(str, case))


def newly_failing(old: Results, new: Results) -> list[str]:
    """Benchmarks that failed in the new report only."""
    return [
        f"{name}: {verdict}"
        for name, verdict in new.verdicts.items()
        if verdict.startswith("FAILED") and not old.verdicts.get(name, "").startswith("FAILED")
    ]


def print_table(compared: list[Comparison], tolerance: float) -> None:
    wide = max(len(f"{line.case}: {line.what}") for line in compared)
    print(f"{'case':{wide}} {'old':>15} {'new':>15} {'new / old':>10}")
    for line in compared:
        values = [shown(value) for value in (line.old, line.new)]
        print(
            f"{f'{line.case}: {line.what}':{wide}} {values[0]:>15} {values[1]:>15} "
            f"{line.ratio:10.3f}  {line.verdict(tolerance)}".rstrip()
        )


def shown(what: Measured) -> str:
    unit, scale = FORMATS[what.unit]
    return f"{what.value / scale:,.2f} {unit}"


def conclude(compared: list[Comparison], failing: list[str], tolerance: float) -> int:
    """Names what is worse; the exit code."""
    verdicts = [(line, line.verdict(tolerance)) for line in compared]
    worse = [(line, verdict) for line, verdict in verdicts if verdict in WORSE.values()]
    others = sum(verdict.startswith("not ours") for _, verdict in verdicts)
    if others:
        print(f"\n{others} measurements of what is not ours are worse: was the machine busy?")
    print(f"\n{len(worse)} of {len(compared)} measurements are worse by more than {tolerance:.0%}")
    for line, verdict in worse:
        print(f"  {verdict}: {line.case}: {line.what} {line.ratio:.2f}x")
    for line in failing:
        print(f"  newly failing: {line}")
    return 1 if worse or failing else 0


if __name__ == "__main__":
    sys.exit(main())
