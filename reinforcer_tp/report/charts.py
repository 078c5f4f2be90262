"""Charts as JSON for page.js: {key, section, title, unit, note, x, traces}, thinned."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

import numpy as np

from reinforcer_tp.report.catalogue import (
    CHARTS,
    LENGTH_PARTS,
    OTHER_COLOR,
    STEP_S,
    TIME_PARTS,
    Chart,
    Line,
)
from reinforcer_tp.report.read import RunFolder, Series
from reinforcer_tp.report.thin import extremes, mean, rounded, smooth, stretches, window

_POINTS = 3_600  # of all raw lines of a chart together, so that a page of many runs stays small
_SMOOTH_SHARE = 3  # one point of a smooth line for so many raw ones
_MAX_BINS = 200
_DASHES = ("solid", "dash", "dot", "dashdot")  # of a run's lines, where the colour says the run

Absent = tuple[str, str]  # title of a chart that has no data, why


def build_charts(runs: Sequence[RunFolder]) -> tuple[list[dict[str, Any]], list[Absent]]:
    """The charts that have data, and those that have none."""
    charts, absent = [], []
    for chart in CHARTS:
        traces = list(_lines(chart, runs))
        if traces:
            charts.append(_about(chart, traces))
        else:
            absent.append((chart.title, chart.absent))
        if chart.key == "tflops":
            _add(charts, absent, _time_split(runs), "Time of a step", "no step was timed")
    for split in ("train", "validation"):
        why = f"data_report.json has no lengths of {split} pairs"
        _add(charts, absent, _lengths(runs, split), f"Lengths of {split} pairs", why)
    return charts, absent


def _add(
    charts: list[dict], absent: list[Absent], chart: dict[str, Any] | None, title: str, why: str
) -> None:
    if chart is None:
        absent.append((title, why))
    else:
        charts.append(chart)


def _about(chart: Chart, traces: list[dict[str, Any]]) -> dict[str, Any]:
    about = {name: getattr(chart, name) for name in ("key", "section", "title", "unit", "note")}
    return about | {"x": "step", "traces": traces}


def _lines(chart: Chart, runs: Sequence[RunFolder]) -> Iterator[dict[str, Any]]:
    present = [
        (number, run, line, dash if len(runs) > 1 else line.dash, run.metrics[line.metric])
        for number, run in enumerate(runs)
        for line, dash in zip(chart.lines, _DASHES, strict=False)
        if line.metric in run.metrics and np.isfinite(run.metrics[line.metric].values).any()
    ]
    max_points = max(_POINTS // max(len(present), 1), 100)
    for number, run, line, dash, series in present:
        color = line.color if len(runs) == 1 else number
        about = {
            "name": _trace_name(runs, run, line.label if len(chart.lines) > 1 else ""),
            "color": color,
            "dash": dash,
            "group": f"{number} {line.metric}",
        }
        if len(runs) == 1 and len(chart.lines) == 1:
            about["name"] = line.label
        yield from _of_line(line, series, about, max_points)


def _of_line(
    line: Line, series: Series, about: dict[str, Any], max_points: int
) -> Iterator[dict[str, Any]]:
    raw = about | _xy(extremes(series, max_points))
    if line.points:
        yield raw | {"kind": "points" if len(series.steps) <= 60 else "line"}
    elif window(len(series.steps)) == 1 or _is_calm(series):
        yield raw | {"kind": "line"}
    else:
        yield raw | {"kind": "raw"}
        points = max(max_points // _SMOOTH_SHARE, 100)
        yield about | _xy(smooth(series, points)) | {"kind": "smooth"}


def _is_calm(series: Series) -> bool:
    """Whether it hardly ever turns round, as a learning rate and a peak do: a mean would lag."""
    signs = np.sign(np.diff(series.values[np.isfinite(series.values)]))
    signs = signs[signs != 0]
    return bool((np.diff(signs) != 0).sum() <= 4)


def _xy(series: Series) -> dict[str, Any]:
    return {"x": series.steps.tolist(), "y": rounded(series.values)}


def _trace_name(runs: Sequence[RunFolder], run: RunFolder, label: str) -> str:
    parts = [label] if len(runs) == 1 else [part for part in (run.name, label) if part]
    return plain_label(" ".join(parts))


def plain_label(text: str) -> str:
    """For the drawing library, whose labels may have tags and these entities, but no &quot;."""
    return escape(text, quote=False)


def _time_split(runs: Sequence[RunFolder]) -> dict[str, Any] | None:
    timed = [run for run in runs if _has(run.metrics.get(STEP_S))]
    if not timed:
        return None
    about = {"key": "time", "section": "Speed", "title": "Time of a step"}
    if len(runs) == 1:
        traces = list(_areas(runs[0]))
        return about | {"unit": "seconds", "x": "step", "traces": traces, "note": ""}
    note = "Seconds; mean of the steps without the first, which warms up."
    return about | {"unit": "seconds", "x": "run", "note": note, "traces": list(_bars(timed))}


def _has(series: Series | None) -> bool:
    return series is not None and bool(np.isfinite(series.values).any())


def _parts(run: RunFolder) -> Iterator[tuple[str, int, Series]]:
    """(label, colour, seconds at the steps of perf/step_s): parts, then what they leave."""
    whole = run.metrics[STEP_S]
    rest = whole.values
    for part in TIME_PARTS:
        found = run.metrics.get(part.metric)
        if found is None or not np.array_equal(found.steps, whole.steps):
            continue
        rest = rest - np.nan_to_num(found.values)
        yield part.label, part.color, found
    yield "other", OTHER_COLOR, Series(whole.steps, np.maximum(rest, 0.0))


def _areas(run: RunFolder) -> Iterator[dict[str, Any]]:
    for label, color, series in _parts(run):
        thin = _xy(stretches(series, _POINTS // 12))
        yield {"name": label, "color": color, "kind": "area", "dash": "solid", **thin}


def _bars(runs: Iterable[RunFolder]) -> Iterator[dict[str, Any]]:
    stacked: dict[str, dict[str, Any]] = {}
    for run in runs:
        for label, color, series in _parts(run):
            trace = {"name": label, "color": color, "kind": "bar", "x": [], "y": []}
            trace = stacked.setdefault(label, trace)
            values = series.values[1:] if len(series.values) > 1 else series.values
            trace["x"] += rounded(np.array([mean(values)]))
            trace["y"].append(plain_label(run.name))
    yield from stacked.values()


def _lengths(runs: Sequence[RunFolder], split: str) -> dict[str, Any] | None:
    traces, seen = [], set()
    for number, run in enumerate(runs):
        found = run.data.get(split)
        histogram = found.get("lengths") if isinstance(found, dict) else None
        if not isinstance(histogram, dict) or repr(histogram) in seen:
            continue  # runs on the same pairs are drawn once
        seen.add(repr(histogram))
        traces += _histogram(runs, run, number, histogram)
    if not traces:
        return None
    about = {"key": f"lengths_{split}", "section": "Data", "title": f"Lengths of {split} pairs"}
    note = "Pairs by their number of tokens."
    return about | {"unit": "pairs", "x": "tokens", "note": note, "traces": traces}


def _histogram(
    runs: Sequence[RunFolder], run: RunFolder, number: int, histogram: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    width = histogram.get("bin_tokens")
    if not _is_count(width) or width == 0:
        return
    for part, color, dash in LENGTH_PARTS:
        counts = histogram.get(part)
        if not isinstance(counts, list) or not all(map(_is_count, counts)) or not any(counts):
            continue
        counts = counts[:_MAX_BINS]
        yield {
            "name": _trace_name(runs, run, part),
            "color": color if len(runs) == 1 else number,
            "dash": dash,
            "kind": "steps",
            "x": [i * width for i in range(len(counts) + 1)],
            "y": [*counts, 0],
        }


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53
