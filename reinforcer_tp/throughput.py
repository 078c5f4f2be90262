"""The speed of a run: rates of a step, and the panel shown at its end."""

import io
from collections.abc import Iterator, Mapping
from statistics import median

from rich.console import Console
from rich.table import Table

# (metric in seconds, label): the parts of perf/step_s, which leave "other".
_PARTS = (
    ("perf/reference_s", "reference"),
    ("perf/data_wait_s", "data wait"),
    ("perf/compute_s", "compute"),
    ("perf/optimizer_s", "optimizer"),
)
# (metric, label, format)
_RATES = (
    ("perf/tokens_per_s", "tokens/s", ",.0f"),
    ("perf/padded_tokens_per_s", "tokens/s with padding", ",.0f"),
    ("perf/pairs_per_s", "pairs/s", ",.2f"),
    ("perf/tflops_per_gpu", "TFLOP/s per device", ",.2f"),
    ("perf/mfu", "MFU", ".1%"),
    ("memory/peak_gib", "peak memory, GiB", ",.2f"),
)


def step_rates(
    *,
    step_s: float,
    num_tokens: int,  # real tokens of the global batch, a shared prompt once
    num_slots: int,  # the same with padding
    num_pairs: int,  # of the global batch
    flops: float,  # of the global batch, forward and backward
    world_size: int,
    peak_tflops: float | None,  # of one device; None = unknown
) -> dict[str, float]:
    """A step's rates over all devices together, but for the last two, which are per device."""
    tflops = flops / step_s / world_size / 1e12
    rates = {
        "perf/tokens_per_s": num_tokens / step_s,
        "perf/padded_tokens_per_s": num_slots / step_s,
        "perf/pairs_per_s": num_pairs / step_s,
        "perf/tflops_per_gpu": tflops,
    }
    if peak_tflops is not None:
        rates["perf/mfu"] = tflops / peak_tflops
    return rates


class Throughput:
    """Collects the steps of a run for `panel`."""

    def __init__(self, sweep_s: float = 0.0):
        """`sweep_s`: seconds that preparing the reference took before training."""
        self._sweep_s = sweep_s
        self._steps: list[dict[str, float]] = []

    def add(self, metrics: Mapping[str, float | None]) -> None:
        """Take a step's metrics: perf/step_s, its parts, rates; others are passed over."""
        names = [name for name, *_ in (*_PARTS, *_RATES)]
        step = {n: metrics[n] for n in names if metrics.get(n) is not None}
        step["perf/step_s"] = metrics["perf/step_s"]
        self._steps.append(step)

    def panel(self) -> str:
        """Medians over the steps, without the first of more than two; "" before any step.

        The first step compiles, allocates and warms up. What the parts leave of a step is `other`;
        peak memory is the largest of all steps.
        """
        if not self._steps:
            return ""
        steps = self._steps[1:] if len(self._steps) > 2 else self._steps
        over = f"median of {len(steps)} step{'s' * (len(steps) > 1)}"
        if len(steps) < len(self._steps):
            over += ", the first left out"
        table = Table("rank 0", "median", "of a step")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in (*_time_rows(steps), *self._rate_rows(steps)):
            table.add_row(*row)
        if self._sweep_s > 0:
            table.add_row("reference, before training", f"{self._sweep_s:,.2f} s", "")
        text = io.StringIO()
        Console(file=text, width=100).print(table)
        return f"throughput: {over}\n{text.getvalue()}".rstrip("\n")

    def _rate_rows(self, steps: list[dict[str, float]]) -> Iterator[tuple[str, str, str]]:
        for name, label, form in _RATES:
            source = self._steps if name == "memory/peak_gib" else steps
            values = [step[name] for step in source if name in step]
            if values:
                value = max(values) if name == "memory/peak_gib" else median(values)
                yield label, format(value, form), ""


def _time_rows(steps: list[dict[str, float]]) -> Iterator[tuple[str, str, str]]:
    step_s = median(step["perf/step_s"] for step in steps)
    yield "step", f"{step_s:.3f} s", ""
    present = [(name, label) for name, label in _PARTS if any(name in step for step in steps)]
    for name, label in present:
        yield _time_row(label, median(step.get(name, 0.0) for step in steps), step_s)
    if present:
        others = (step["perf/step_s"] - sum(step.get(n, 0.0) for n, _ in present) for step in steps)
        yield _time_row("other", max(median(others), 0.0), step_s)


def _time_row(label: str, part_s: float, step_s: float) -> tuple[str, str, str]:
    return f"  {label}", f"{part_s:.3f} s", f"{part_s / step_s:.1%}"
