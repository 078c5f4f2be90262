"""Metrics of a run: metrics.jsonl, TensorBoard, hosted trackers, and what the terminal shows.

One JSON object a line with its `step`; the same names go to every logger. All of it is rank 0's.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from reinforcer_tp.config import ConfigError
from reinforcer_tp.environment import environment_info
from reinforcer_tp.progress import Progress, train_line, validation_line
from reinforcer_tp.trackers import check_trackers, open_trackers

__all__ = [
    "MetricLogger",
    "Progress",
    "check_loggers",
    "environment_info",
    "open_loggers",
    "train_line",
    "validation_line",
]


class MetricLogger:
    """Writes metrics to every open sink; `with` closes them, also when training fails."""

    def __init__(
        self,
        jsonl: IO[str],
        sinks: list[Callable[[Mapping[str, float], int], None]],  # (finite metrics, step)
        closers: list[Callable[[], None]],
    ):
        self._jsonl = jsonl
        self._sinks = sinks
        self._closers = closers

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Write `metrics` (name -> number) of optimizer step `step`.

        None, nan and inf become null in metrics.jsonl and are left out elsewhere.
        """
        values = {name: _number(value) for name, value in metrics.items()}
        self._jsonl.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._jsonl.flush()
        finite = {name: value for name, value in values.items() if value is not None}
        for sink in self._sinks:
            sink(finite, step)

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        self._jsonl.close()
        while self._closers:
            self._closers.pop()()

    def __enter__(self) -> "MetricLogger":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def check_loggers(logger_config) -> None:
    """Raise ConfigError when an enabled logger's package is not installed; imports none of them.

    Cheap and alike on every rank, so it can run before any process group exists.
    """
    check_trackers(logger_config)


def open_loggers(
    logger_config, log_dir: str, config_dict: Mapping, resume_step: int
) -> MetricLogger:
    """Open <log_dir>/metrics.jsonl and every logger that `logger_config` (LoggerConfig) enables.

    `config_dict` is what trackers record as the run's configuration, as it is. `resume_step` is the
    number of optimizer steps already done: metrics.jsonl loses its later lines, a resumed run goes
    on in the same tracker runs; 0 starts all of them anew. Call on rank 0 only, before training.

    Raises:
        ConfigError: an enabled logger's package is not installed, or metrics.jsonl is damaged.
    """
    check_loggers(logger_config)
    folder = Path(log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    cut_metrics(folder / "metrics.jsonl", resume_step)
    trackers = open_trackers(logger_config, folder, dict(config_dict), resume_step)
    sinks = [tracker.log for tracker in trackers]
    closers = [tracker.close for tracker in trackers]
    if logger_config.tensorboard_enabled:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        # Events of steps from purge_step on are those of a run that went on past its checkpoint.
        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)
        sinks.append(lambda metrics, step: _write_scalars(writer, metrics, step))
        closers.append(writer.close)
    return MetricLogger((folder / "metrics.jsonl").open("a", encoding="utf-8"), sinks, closers)


def cut_metrics(path: Path, resume_step: int) -> None:
    """Remove the lines of steps after `resume_step` (0: all lines) and a torn last line.

    Raises:
        ConfigError: another line is not an object with a `step`.
    """
    if not path.exists():
        return
    kept = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):  # only a line that was being written has no end
            break
        if resume_step > 0 and _step_of(line, path, number) <= resume_step:
            kept.append(line)
    replacement = path.with_suffix(".jsonl.new")
    replacement.write_text("".join(kept), encoding="utf-8")
    os.replace(replacement, path)


def _step_of(line: str, path: Path, number: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} line {number} is {line.strip()[:80]!r}, expected a JSON object with a step; "
            "remove that line, or the file, to resume"
        ) from error


def _number(value: float | None) -> float | int | None:
    """A Python number that JSON can hold; tensors and numpy scalars are converted."""
    if value is None or isinstance(value, int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


def _write_scalars(writer, metrics: Mapping[str, float], step: int) -> None:
    for name, value in metrics.items():
        writer.add_scalar(name, value, step)
    writer.flush()
