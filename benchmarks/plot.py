"""Draws benchmarks/results/*.jsonl: python -m benchmarks.plot [FILE ...]; a PNG beside each file.

Only draws: every number comes from the rows, of each contender and pass the newest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

from benchmarks.measure import PASSES, RESULTS, read_rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"ours": "#1b6ca8", "gemms": "#9a9a9a"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="default: all of benchmarks/results")
    files = parser.parse_args(argv).files or sorted(RESULTS.glob("*.jsonl"))
    if not files:
        print(f"error: no rows in {RESULTS}; run python -m benchmarks.linear_logprob first")
        return 1
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        print(f"error: no such file: {', '.join(missing)}")
        return 1
    for path in files:
        print(draw(path))
    return 0


def draw(path: Path) -> Path:
    """One line of panels a (shape, N, dtype): the three passes, and the extra memory."""
    cases = newest(read_rows(path))
    figure, axes = plt.subplots(
        len(cases), 4, figsize=(18, 2.6 * len(cases) + 0.6), squeeze=False, layout="constrained"
    )
    for line, (case, rows) in zip(axes, cases.items(), strict=True):
        for ax, name in zip(line, PASSES, strict=False):
            _draw_times(ax, [row for row in rows if row["pass"] == name])
            ax.set_title(f"{case}\n{name}", fontsize=9)
        _draw_memory(line[3], [r for r in rows if r["pass"] == "both" and r["extra_bytes"]])
        line[3].set_title("extra memory, both", fontsize=9)
    some = next(iter(cases.values()))[0]
    figure.suptitle(
        f"{some['device']}, torch {some['torch']}, {some['commit']}: median (bar), 20th to 80th "
        "percentile (line), minimum (dot)"
    )
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


def newest(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows by "shape N=... dtype", of each contender and pass only the last one written."""
    last = {}
    for row in rows:
        case = f"{row['shape']} N={row['n']} {row['dtype']}"
        key = (case, row["contender"], row["pass"])
        last.pop(key, None)
        last[key] = row
    cases = {}
    for (case, *_), row in last.items():
        cases.setdefault(case, []).append(row)
    return cases


def _draw_times(ax, rows: list[dict]) -> None:
    median, p20, p80, least = (
        [1e3 * row[key] for row in rows] for key in ("median_s", "p20_s", "p80_s", "min_s")
    )
    names = [row["contender"] for row in rows]
    below = [m - p for m, p in zip(median, p20, strict=True)]
    above = [p - m for m, p in zip(median, p80, strict=True)]
    ax.barh(names, median, xerr=[below, above], color=[_color(name) for name in names], capsize=2)
    ax.plot(least, names, "k.", markersize=5)
    _finish(ax, "ms")


def _draw_memory(ax, rows: list[dict]) -> None:
    names = [row["contender"] for row in rows]
    mib = [row["extra_bytes"] / 2**20 for row in rows]
    ax.barh(names, mib, color=[_color(name) for name in names])
    _finish(ax, "MiB")


def _finish(ax, unit: str) -> None:
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.set_xlabel(unit, fontsize=8)
    ax.tick_params(labelsize=8)


def _color(name: str) -> str:
    return COLORS.get(name.split("-")[0], "#d08a3c")


if __name__ == "__main__":
    sys.exit(main())
