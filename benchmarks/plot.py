"""Draws result files: python -m benchmarks.plot [FILE ...]; a PNG beside each file.

Files of rows (.jsonl) and reports (.json) of run_all and gpu_suite. Only draws: every number comes
from the rows, of each case the newest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from benchmarks.cases import Measured, case_of, kind_of, measured, newest, read_results
from benchmarks.measure import PASSES, RESULTS
from benchmarks.table import BY_NAME

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, RIVAL, FLOOR = "#1b6ca8", "#d08a3c", "#9a9a9a"
DRAWN = ("*.jsonl", "*/*.jsonl", "runs/*.json", "gpu/*.json")  # in benchmarks/results
# By unit, the largest first: (least value, name, in terms of the unit)
SCALES = {
    "s": [(10, "s", 1), (0, "ms", 1e-3)],
    "bytes": [(2**33, "GiB", 2**30), (0, "MiB", 2**20)],
    "1/s": [(0, "per second", 1)],
    "tokens": [(0, "tokens", 1)],
}


@dataclass(frozen=True, kw_only=True)
class Bar:
    name: str
    what: Measured
    color: str = OURS
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Bars of one unit."""

    title: str
    bars: list[Bar]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="default: all of benchmarks/results")
    files = parser.parse_args(argv).files
    files = files or sorted(path for kind in DRAWN for path in RESULTS.glob(kind))
    if not files:
        print(f"error: no results in {RESULTS}; run python -m benchmarks.run_all first")
    codes = {_draw_or_say(path) for path in files}
    return 0 if codes == {0} else 1


def _draw_or_say(path: Path) -> int:
    try:
        rows = list(newest(read_results(path).rows).values())
    except ValueError as error:
        print(f"error: {error}")
        return 1
    rows = [row for row in rows if not BY_NAME[kind_of(row)].draws]
    if not rows:
        print(f"{path}: no rows, or of benchmarks that draw their own figures")
        return 0
    print(draw(path, rows))
    return 0


def draw(path: Path, rows: list[dict]) -> Path:
    """Every benchmark a heading and lines of panels; the PNG's path."""
    lines = []
    for kind in dict.fromkeys(kind_of(row) for row in rows):
        of_kind = [row for row in rows if kind_of(row) == kind]
        headings = [kind] + [""] * len(of_kind)
        lines += list(zip(headings, KINDS.get(kind, anything)(of_kind), strict=False))
    heights = [
        0.7 + 0.3 * bool(heading) + 0.28 * max(len(panel.bars) for panel in line)
        for heading, line in lines
    ]
    width = 17 if max(len(line) for _, line in lines) > 2 else 11
    figure = plt.figure(figsize=(width, sum(heights) + 0.5), layout="constrained")
    parts = figure.subfigures(len(lines), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (heading, line) in zip(parts, lines, strict=True):
        if heading:
            part.suptitle(heading, x=0.01, ha="left", fontsize=12, fontweight="bold")
        axes = part.subplots(1, len(line), squeeze=False)[0]
        for ax, panel in zip(axes, line, strict=True):
            draw_panel(ax, panel)
    figure.suptitle(
        f"{_all_of(rows, 'device')}, torch {_all_of(rows, 'torch')}, commit "
        f"{_all_of(rows, 'commit')}: median (bar), 20th to 80th percentile (line), minimum (dot)",
        fontsize=10,
    )
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=100)
    plt.close(figure)
    return target


def _all_of(rows: list[dict], field: str) -> str:
    return ", ".join(dict.fromkeys(str(row.get(field, "unknown")) for row in rows))


def draw_panel(ax, panel: Panel) -> None:
    most = max(bar.what.value for bar in panel.bars)
    scales = SCALES[panel.bars[0].what.unit]
    unit, scale = next((name, scale) for least, name, scale in scales if most >= least)
    for place, bar in enumerate(panel.bars):
        low, value, high = (number / scale for number in bar.what.range())
        error = [[value - low], [high - value]] if low < high else None
        ax.barh(place, value, xerr=error, color=bar.color, capsize=2, height=0.75)
        if bar.what.least is not None:
            ax.plot(bar.what.least / scale, place, "k.", markersize=4)
        note = f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
        text = f" {note}{'  ' + bar.note if bar.note else ''}"
        ax.text(max(value, high), place, text, va="center", fontsize=7)
    ax.set_yticks(range(len(panel.bars)), [bar.name for bar in panel.bars])
    ax.invert_yaxis()
    ax.set_xlim(0, ax.dataLim.x1 * 1.25 or 1)  # room for the numbers
    ax.set_xlabel(unit, fontsize=8, labelpad=1)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(panel.title, fontsize=9)


def grouped(rows: list[dict], *fields: str) -> dict[str, list[dict]]:
    """Rows by the values of these fields, in one text."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(" ".join(str(row[field]) for field in fields), []).append(row)
    return groups


def operator(rows: list[dict]) -> list[list[Panel]]:
    """A line for each shape, number of tokens and dtype: three passes and the extra memory."""

    def panel(title: str, of: list[dict], what: str) -> Panel:
        bars = [(row["contender"], measured(row).get(what)) for row in of]
        bars = [(name, value) for name, value in bars if value and (value.value or what == "time")]
        return Panel(title=title, bars=[Bar(name=n, what=v, color=_color(n)) for n, v in bars])

    lines = []
    for of_case in grouped(rows, "shape", "n", "dtype").values():
        case = "{shape} N={n} {dtype}".format_map(of_case[0])
        passes = grouped(of_case, "pass")
        line = [panel(f"{case}, {name}", passes.get(name, []), "time") for name in PASSES]
        line.append(panel(f"{case}, both: extra memory", passes.get("both", []), "extra_bytes"))
        lines.append([panel for panel in line if panel.bars])
    return lines


def _color(contender: str) -> str:
    return {"ours": OURS, "gemms": FLOOR}.get(contender.split("-")[0], RIVAL)


def attention(rows: list[dict]) -> list[list[Panel]]:
    """A line for each dtype, a panel for each case: both contenders by number of threads."""

    def bar(row: dict) -> Bar:
        name, threads = row["contender"], row["threads"]
        note = f"{row['speedup']:.2f}x" if name == "ours" else ""
        label = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
        return Bar(name=label, what=measured(row)["time"], color=_color(name), note=note)

    return [
        [Panel(title=f"{case}, {dtype}", bars=[bar(row) for row in of_case])
         for case, of_case in grouped(of_dtype, "case").items()]
        for dtype, of_dtype in grouped(rows, "dtype").items()
    ]  # fmt: skip


def shared_prompts(rows: list[dict]) -> list[list[Panel]]:
    """A line for each model: time of a step and its tokens, prompts twice and once."""
    lines = []
    for row in rows:
        title = f"{row['model']}, {row['pairs']} pairs of {row['data']}, {row['precision']}"
        step = {share: measured(times)["time"] for share, times in row["step"].items()}
        tokens = {share: _count(count) for share, count in row["tokens"].items()}
        notes = {"step": f"{row['speed_up']:.2f}x", "tokens": f"{row['token_ratio']:.2f}x fewer"}
        lines.append(
            [
                _shares(f"{title}: {name}", of, notes[name])
                for name, of in (("step", step), ("tokens", tokens))
            ]
        )
    return lines


def _count(number: int) -> Measured:
    return Measured(unit="tokens", value=number, low=number, high=number)


def _shares(title: str, by_share: dict[str, Measured], note: str) -> Panel:
    twice = Bar(name="prompt twice", what=by_share["nothing"], color=RIVAL)
    return Panel(title=title, bars=[twice, Bar(name="once", what=by_share["prompt"], note=note)])


def reference_store(rows: list[dict]) -> list[list[Panel]]:
    """A panel for each model: an epoch in each of three ways."""
    line = []
    for row in rows:
        times = {way: measured(epoch)["time"] for way, epoch in row["epoch"].items()}
        notes = {
            "store": f"{row['speed_up']:.2f}x",
            "cold": f"{row['speed_up_with_sweep']:.2f}x, swept first",
        }
        bars = [
            Bar(name=way, what=what, color=OURS if way in notes else RIVAL, note=notes.get(way, ""))
            for way, what in times.items()
        ]
        title = f"{row['model']}, {row['precision']}: an epoch of {row['steps']} steps"
        line.append(Panel(title=title, bars=bars))
    return [line]


def anything(rows: list[dict]) -> list[list[Panel]]:
    """A line for each measured thing, its bars named after the cases."""
    things: dict[str, list[Bar]] = {}
    for row in rows:
        for name, what in measured(row).items():
            case = " ".join(map(str, case_of(row)[1:]))
            things.setdefault(name, []).append(Bar(name=case, what=what))
    return [[Panel(title=name, bars=bars)] for name, bars in things.items()]


KINDS: dict[str, Callable[[list[dict]], list[list[Panel]]]] = {
    "linear_logprob": operator,
    "attention": attention,
    "shared_prompts": shared_prompts,
    "reference_store": reference_store,
}


if __name__ == "__main__":
    sys.exit(main())
