"""What rank 0 shows while training: a rich bar with ETA on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

# (metric, label, format) in the order shown; a metric that is absent is left out.
_COLUMNS = (
    ("loss", "loss", ".4f"),
    ("rewards/accuracies", "acc", ".3f"),
    ("rewards/margins", "margin", ".4f"),
    ("grad_norm", "grad_norm", ".2f"),
    ("lr", "lr", ".1e"),
)


class Watch(Protocol):
    """What `stops.Stops` is here."""

    def phase(self, name: str) -> None: ...

    def tick(self) -> None: ...


class Progress:
    """The run's progress on rank 0; on other ranks every method does nothing."""

    def __init__(
        self,
        total_steps: int,
        start_step: int,  # steps done before this process started
        is_rank0: bool,
        watch: Watch | None = None,  # is told of other work, on every rank
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,  # seconds
    ):
        self._total_steps = total_steps
        self._start_step = start_step
        self._clock = clock
        self._watch = watch
        self._begin_s: float | None = None
        self._is_rank0 = is_rank0
        self._console = console or Console(highlight=False)
        self._bar: RichProgress | None = None
        if is_rank0 and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = RichProgress(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.description}", markup=False),
                console=self._console,
            )
            # Shown from the first step on: other work may have its bar before that.
            self._task = self._bar.add_task(
                "", total=total_steps, completed=start_step, visible=False
            )

    def update(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Show optimizer step `step` (from 1) with its `metrics`, named with or without train/."""
        if not self._is_rank0:
            return
        eta = self._eta(step, metrics.get("perf/step_s"))
        if self._bar is None:
            print(train_line(step, self._total_steps, metrics, eta), flush=True)
            return
        self._bar.start()
        description = " | ".join([*_values(metrics, "train/"), f"ETA {eta}"])
        self._bar.update(self._task, completed=step, description=description, visible=True)

    def track(self, label: str, total: int) -> "Track":
        """Progress through `total` pairs of other work, before or between the steps."""
        return Track(self, label, total)

    def message(self, text: str) -> None:
        """Print `text` as lines of its own, above the bar if there is one."""
        if not self._is_rank0:
            return
        if self._bar is None:
            print(text, flush=True)
        else:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the bar; a second call does nothing."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _eta(self, step: int, step_s: float | None) -> str:
        """h:mm:ss left at the average pace so far, validation and checkpoints included."""
        now_s = self._clock()
        if self._begin_s is None:
            self._begin_s = now_s - (step_s or 0.0)
        pace_s = (now_s - self._begin_s) / max(step - self._start_step, 1)
        return _duration(pace_s * (self._total_steps - step))


class Track:
    """Progress of work counted in pairs: a bar on a terminal, about ten lines elsewhere."""

    def __init__(self, progress: Progress, label: str, total: int):
        self._progress = progress
        self._label = label
        self._total = total
        self._done = 0
        self._begin_s = progress._clock() if progress._is_rank0 else 0.0
        if progress._watch is not None:
            progress._watch.phase("sweep")
        self._bar_task: TaskID | None = None
        self._last_line: str | None = None
        if progress._bar is not None:
            progress._bar.start()
            self._bar_task = progress._bar.add_task(label, total=total)

    def advance(self, done: int, rate_text: str = "") -> None:
        """`done` pairs so far (not since the last call); `rate_text` as in "3,210 tokens/s"."""
        progress = self._progress
        if progress._watch is not None:
            progress._watch.tick()
        if not progress._is_rank0:
            return
        elapsed_s = progress._clock() - self._begin_s
        eta = f"ETA {_duration(elapsed_s / done * (self._total - done))}" if done else ""
        about = [text for text in (rate_text, eta) if text]
        line = f"{self._label}: {done} of {self._total} pairs"
        is_due = self._done == 0 or done == self._total
        is_due |= done * 10 // max(self._total, 1) > self._done * 10 // max(self._total, 1)
        self._done = done
        if self._bar_task is None:
            if is_due:
                progress.message(" | ".join([line, *about]))
            return
        progress._bar.update(
            self._bar_task, completed=done, description=" | ".join([self._label, *about])
        )
        self._last_line = " | ".join([line, *about])

    def close(self) -> None:
        """Replace the bar by a line that stays; a second call does nothing."""
        if self._progress._watch is not None:
            self._progress._watch.phase("reference")
        if self._bar_task is None:
            return
        bar = self._progress._bar
        if self._last_line is not None:
            self._progress.message(self._last_line)
        bar.remove_task(self._bar_task)
        self._bar_task = None
        if not any(task.visible for task in bar.tasks):
            bar.stop()

    def __enter__(self) -> "Track":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def train_line(
    step: int, total_steps: int, metrics: Mapping[str, float | None], eta: str | None = None
) -> str:
    """`step 12/60 | loss 0.6512 | acc 0.712 | ... | 0.41 s | ETA 0:00:20` from a step's metrics."""
    parts = [f"step {step}/{total_steps}", *_values(metrics, "train/")]
    if metrics.get("perf/step_s") is not None:
        parts.append(f"{metrics['perf/step_s']:.2f} s")
    if eta is not None:
        parts.append(f"ETA {eta}")
    return " | ".join(parts)


def validation_line(step: int, metrics: Mapping[str, float | None]) -> str:
    """`validation after step 25 | loss 0.6312 | acc 0.712 | margin 0.1200 | 192 pairs`."""
    parts = [f"validation after step {step}", *_values(metrics, "validation/")]
    num_pairs = metrics.get("validation/num_pairs", metrics.get("num_pairs"))
    if num_pairs is not None:
        parts.append(f"{num_pairs:.0f} pairs")
    return " | ".join(parts)


def _values(metrics: Mapping[str, float | None], prefix: str) -> list[str]:
    values = {name.removeprefix(prefix): value for name, value in metrics.items()}
    return [
        f"{label} {values[name]:{form}}"
        for name, label, form in _COLUMNS
        if values.get(name) is not None
    ]
