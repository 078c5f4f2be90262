"""What happened in a run: events.jsonl and how each attempt ended, in the order of time."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforcer_tp.events import FILE, KINDS
from reinforcer_tp.report.read import is_step, read_lines, read_object, shorten

MAX_EVENTS = 1_000  # of a run; of more the first and the last half
_MAX_ATTEMPTS = 10_000
_ENDINGS = {"done": "done", "stop": "stop", "error": "failure", "lost": "failure"}
_MAX_TIME = 253_402_300_799.0  # of the year 9999


@dataclass(frozen=True, kw_only=True)
class Event:
    kind: str  # of events.KINDS, or done, stop, failure, killed
    step: int | None
    time: float | None  # seconds since 1970
    text: str


def read_events(path: Path, problems: list[str]) -> list[Event]:
    """Events of the run folder `path`; how many were left out of very many is in `problems`."""
    events = [_event(line) for line in read_lines(path / FILE, problems)]
    attempts = _attempts(path, problems)
    if not (path / FILE).exists():  # a run from before there were events
        attempts += _resumes(path)
    events = sorted([*events, *attempts], key=lambda event: event.time or 0.0)
    if len(events) > MAX_EVENTS:
        problems.append(f"{len(events) - MAX_EVENTS:,} of {len(events):,} events are left out")
        events = [*events[: MAX_EVENTS // 2], *events[-MAX_EVENTS // 2 :]]
    return events


def _event(line: dict[str, Any]) -> Event:
    kind = line.get("kind")
    return Event(
        kind=kind if kind in KINDS else "warning",
        step=line["step"],
        time=_time(line.get("time")),
        text=shorten(line.get("text", "")),
    )


def _folders(path: Path) -> list[Path]:
    parent = path / "attempts"
    if not parent.is_dir():
        return []
    folders = [found for found in parent.iterdir() if found.name.isdecimal()]
    return sorted(folders, key=lambda found: int(found.name))[-_MAX_ATTEMPTS:]


def _attempts(path: Path, problems: list[str]) -> list[Event]:
    """How each attempt ended; nothing of the last one while it may still be running."""
    events, folders = [], _folders(path)
    for folder in folders:
        exit_file = folder / "exit.json"
        if exit_file.is_file():
            ended = read_object(exit_file, problems)
            events.append(_ending(ended, folder.name))
        elif folder != folders[-1]:
            began = _time(read_object(folder / "attempt.json", problems).get("started"))
            text = f"attempt {folder.name} ended without a word: it was killed"
            events.append(Event(kind="killed", step=None, time=began, text=text))
    return events


def _ending(ended: dict[str, Any], number: str) -> Event:
    step = ended.get("step")
    kind = _ENDINGS.get(str(ended.get("cause")), "failure")
    name = "" if kind == "done" else f" with {shorten(ended.get('name'), 40)}"
    return Event(
        kind=kind,
        step=step if is_step(step) else None,
        time=_time(ended.get("ended")),
        text=f"attempt {number} ended{name}: {shorten(ended.get('message', ''))}",
    )


def _resumes(path: Path) -> list[Event]:
    found = []
    for folder in _folders(path):
        ended = read_object(folder / "exit.json", [])
        step = ended.get("start_step")
        if is_step(step) and step > 0:
            text = f"attempt {folder.name} went on from step {step}"
            time = _time(ended.get("started"))
            found.append(Event(kind="resume", step=step, time=time, text=text))
    return found


def _time(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and 0 <= value < _MAX_TIME else None
