"""Fewer points that look alike: spikes stay, a smooth line is a mean over the last steps."""

import itertools
import math

import numpy as np

from reinforcer_tp.report.read import Series

_SHOWN_DIGITS = 5
_SMOOTHED_FROM = 40  # points; fewer are drawn as they are
_WINDOWS = 50  # that a run is long, of the mean


def extremes(series: Series, max_points: int) -> Series:
    """At most `max_points` points: of each stretch of steps the lowest and the highest.

    A stretch with a value that is not finite keeps one such point, so that the line has its gap.
    """
    num = len(series.steps)
    if num <= max_points:
        return series
    bounds = np.linspace(0, num, max(max_points // 3, 1) + 1).astype(np.int64)
    kept: set[int] = set()
    for begin, end in itertools.pairwise(bounds):
        values = series.values[begin:end]
        is_finite = np.isfinite(values)
        if not is_finite.all():
            kept.add(int(begin + is_finite.argmin()))
        if is_finite.any():
            kept.add(int(begin + np.where(is_finite, values, np.inf).argmin()))
            kept.add(int(begin + np.where(is_finite, values, -np.inf).argmax()))
    index = np.array(sorted(kept))
    return Series(series.steps[index], series.values[index])


def window(num_points: int) -> int:
    """Points that the smooth line takes the mean of; 1 = it is left out."""
    return 1 if num_points < _SMOOTHED_FROM else max(5, num_points // _WINDOWS)


def smooth(series: Series, max_points: int) -> Series:
    """The mean of the last `window` values, at `max_points` steps at most."""
    num, size = len(series.steps), window(len(series.steps))
    index = np.unique(np.linspace(0, num - 1, min(num, max_points)).astype(np.int64))
    means = [mean(series.values[max(0, i - size + 1) : i + 1]) for i in index.tolist()]
    return Series(series.steps[index], np.array(means))


def stretches(series: Series, max_points: int) -> Series:
    """The mean of each of at most `max_points` stretches, at its last step."""
    num = len(series.steps)
    if num <= max_points:
        return series
    bounds = np.linspace(0, num, max_points + 1).astype(np.int64)
    pairs = list(itertools.pairwise(bounds))
    means = [mean(series.values[begin:end]) for begin, end in pairs]
    return Series(series.steps[bounds[1:] - 1], np.array(means))


def mean(values: np.ndarray) -> float:
    """Of the finite ones; NaN without any."""
    finite = values[np.isfinite(values)]
    with np.errstate(over="ignore"):
        return float(finite.mean()) if len(finite) else math.nan


def rounded(values: np.ndarray) -> list[float | None]:
    """For JSON: few digits, None for what is not finite."""
    return [
        float(f"{value:.{_SHOWN_DIGITS}g}") if math.isfinite(value) else None
        for value in values.tolist()
    ]
