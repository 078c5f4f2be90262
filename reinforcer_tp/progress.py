"""What rank 0 shows while training: a rich bar with ETA on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

# (metric, label, format) in the order shown; a metric that is absent is left out.
_COLUMNS = (
    ("loss", "loss", ".4f"),
    ("rewards/accuracies", "acc", ".2f"),
    ("rewards/margins", "margin", ".4f"),
    ("grad_norm", "grad_norm", ".2f"),
    ("lr", "lr", ".1e"),
)


class Progress:
    """The run's progress on rank 0; on other ranks every method does nothing."""

    def __init__(
        self,
        total_steps: int,
        start_step: int,  # steps done before this process started
        is_rank0: bool,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,  # seconds
    ):
        self._total_steps = total_steps
        self._start_step = start_step
        self._clock = clock
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
                transient=True,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=start_step)

    def start(self) -> None:
        """Count the time left from here: what came before is not part of a step."""
        self._begin_s = self._clock()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show optimizer step `step` (from 1) with its `metrics`, named with or without train/."""
        if not self._is_rank0:
            return
        eta = self._eta(step, metrics)
        if self._bar is None:
            print(train_line(step, self._total_steps, metrics, eta), flush=True)
            return
        self._bar.start()
        description = " | ".join([*_values(metrics, "train/"), f"ETA {eta}"])
        self._bar.update(self._task, completed=step, description=description)

    def message(self, text: str) -> None:
        """Print `text` as lines of its own, above the bar if there is one."""
        if not self._is_rank0:
            return
        if self._bar is None:
            print(text, flush=True)
        else:
            self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the bar; a second call does nothing."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()
