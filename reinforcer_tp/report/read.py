"""A run folder as the report shows it. What is in its files is not trusted, and may be damaged."""

import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from reinforcer_tp.config_yaml import read_yaml
from reinforcer_tp.strict_json import parse_json

MAX_LINE = 1 << 20  # bytes of a line of a .jsonl file
_MAX_FILE = 16 << 20  # bytes of a .json file
_MAX_NAMES = 500  # metrics of different names
_MAX_KEYS = 5_000  # of a tree
_MAX_TEXT = 400  # characters of one value
_NAMED = 5  # damaged lines of a file that are described one by one
MAX_STEP = 2**53  # what a browser counts to


class ReportError(ValueError):
    """No report can be drawn; one line says why and what to do."""


@dataclass(frozen=True, eq=False)
class Series:
    """One metric: steps (n,) int64, rising; values (n,) float64, NaN where it was not finite."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """What was found; a file that is not there is empty."""

    name: str
    path: Path
    config: Mapping[str, str] = field(default_factory=dict)  # dotted key -> value as text
    environment: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Series] = field(default_factory=dict)
    finished_steps: int | None = None
    problems: tuple[str, ...] = ()  # what could not be read, a line each


def read_run(path: Path, name: str) -> RunFolder:
    """Everything but the events. ReportError where `path` holds no run."""
    if not any((path / file).is_file() for file in ("config.yaml", "metrics.jsonl")):
        raise ReportError(
            f"{path} holds no run: expected a folder with config.yaml or metrics.jsonl; "
            "give the logger.log_dir of a run"
        )
    problems: list[str] = []
    finished = read_object(path / "finished.json", problems).get("steps")
    return RunFolder(
        name=name,
        path=path,
        config=_read_config(path / "config.yaml", problems),
        environment=read_object(path / "environment.json", problems),
        data=read_object(path / "data_report.json", problems),
        metrics=_read_metrics(path / "metrics.jsonl", problems),
        finished_steps=finished if is_step(finished) else None,
        problems=tuple(problems),
    )


def read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    """The JSON object in `path`; {} without such a file, and with a line in `problems`."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FILE + 1)
        if len(content) > _MAX_FILE:
            raise ValueError(f"more than {_MAX_FILE >> 20} MiB")
        value = parse_json(content)
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} could not be read: {shorten(error)}")
        return {}


def read_lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The objects in the lines of `path`; those that are damaged are counted in `problems`."""
    damaged: list[str] = []
    num_damaged = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(_lines(file), start=1):
                try:
                    yield _object(line)
                except ValueError as error:
                    num_damaged += 1
                    if len(damaged) < _NAMED:
                        damaged.append(f"line {number} ({shorten(error, 120)})")
    except FileNotFoundError:
        return
    except OSError as error:
        problems.append(f"{path.name} could not be read: {shorten(error)}")
    if num_damaged:
        more = ", ..." * (num_damaged > len(damaged))
        problems.append(
            f"{path.name}: {num_damaged:,} damaged lines left out: {', '.join(damaged)}{more}"
        )


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines, each with no more than its first MAX_LINE + 1 bytes."""
    while line := file.readline(MAX_LINE + 1):
        rest = line
        while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE + 1)
        yield line


def _object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise ValueError(f"longer than {MAX_LINE:,} bytes")
    if not line.endswith(b"\n"):
        raise ValueError("it has no end: it was being written")
    value = parse_json(line)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    if not is_step(value.get("step")):
        raise ValueError(f"its step is {value.get('step')!r}")
    return value


def is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_STEP


def _read_metrics(path: Path, problems: list[str]) -> dict[str, Series]:
    found: dict[str, tuple[array, array]] = {}
    odd: dict[str, int] = {}  # metric -> values that are no number
    num_unnamed = 0
    for line in read_lines(path, problems):
        step = line.pop("step")
        for name, value in line.items():
            if name not in found and len(found) == _MAX_NAMES:
                num_unnamed += 1
                continue
            if value is None:
                value = math.nan
            elif type(value) not in (int, float):
                odd[name] = odd.get(name, 0) + 1
                continue
            steps, values = found.setdefault(name, (array("q"), array("d")))
            steps.append(step)
            values.append(value)
    for name, count in list(odd.items())[:_NAMED]:
        problems.append(f"{path.name}: {count:,} values of {shorten(name, 80)} are no numbers")
    if num_unnamed:
        problems.append(f"{path.name}: more than {_MAX_NAMES} metrics; the others are left out")
    return {name: _series(*arrays) for name, arrays in found.items()}


def _series(steps: array, values: array) -> Series:
    """In order; of a step that was logged twice the later value."""
    steps, values = np.frombuffer(steps, np.int64), np.frombuffer(values, np.float64)
    if (np.diff(steps) <= 0).any():
        steps, last = np.unique(steps[::-1], return_index=True)
        values = values[::-1][last]
    return Series(steps, values)


def _read_config(path: Path, problems: list[str]) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        return flatten(read_yaml(str(path)))
    except ValueError as error:  # ConfigError
        problems.append(f"{path.name} could not be read: {shorten(error)}")
        return {}


def flatten(tree: Mapping[str, Any]) -> dict[str, str]:
    """A tree of mappings as dotted key -> text, both cut where they are very long."""
    found: dict[str, str] = {}
    _flatten(tree, "", found)
    return found


def _flatten(tree: Mapping[str, Any], prefix: str, found: dict[str, str]) -> None:
    for key, value in tree.items():
        if len(found) >= _MAX_KEYS:
            return
        name = shorten(f"{prefix}{key}", 200)
        if isinstance(value, Mapping) and value:
            _flatten(value, f"{name}.", found)
        else:
            found[name] = shorten(as_text(value))


def as_text(value: Any) -> str:
    """As YAML has it: null, true; lists with commas."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if value in ({}, []):
        return "none"
    if isinstance(value, list):
        return ", ".join(map(as_text, value[:50])) + ", ..." * (len(value) > 50)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def shorten(value: object, length: int = _MAX_TEXT) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= length else f"{text[: length - 3]}..."
