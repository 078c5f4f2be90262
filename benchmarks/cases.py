"""What a result file holds: rows, the case of each, and what was measured.

A file is either rows (.jsonl, an object a line) or a report that has them in its `parts` (.json, of
run_all and gpu_suite).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.table import BY_NAME

STATISTICS = ("median_s", "p20_s", "p80_s", "min_s")
# Ends of the names of measured fields: (unit, in terms of it). A rate is better when it is higher.
ENDS = {
    "_per_s": ("1/s", 1),
    "_s": ("s", 1),
    "_bytes": ("bytes", 1),
    "_mib": ("bytes", 2**20),
    "_gib": ("bytes", 2**30),
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A median with its 20th and 80th percentile; of one measurement all three are it."""

    unit: str  # s, bytes, 1/s
    value: float
    low: float
    high: float
    least: float | None = None

    def range(self) -> tuple[float, float, float]:
        return self.low, self.value, self.high


@dataclass(frozen=True, kw_only=True)
class Results:
    rows: list[dict]
    verdicts: dict[str, str]  # by part; a file of rows has none


def read_results(path: Path) -> Results:
    """Raises ValueError, which names the file and the place, where it is not what was written."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); expected .jsonl or .json") from error
    if path.suffix == ".jsonl":
        lines = {f"{path}, line {i}": line for i, line in enumerate(text.split("\n"), start=1)}
        rows = [_checked(_parsed(line, where), where) for where, line in lines.items() if line]
        return Results(rows=rows, verdicts={})
    return _of_report(path, _parsed(text, str(path)))


def _of_report(path: Path, report: Any) -> Results:
    rows, verdicts = [], {}
    try:
        for name, part in report["parts"].items():
            verdicts[name] = str(part["verdict"])
            for i, row in enumerate(part["found"].get("rows", []), start=1):
                rows.append(_checked(row, f"{path}, part {name}, row {i}"))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: {type(error).__name__}: {error}; expected the `parts` of run_all or gpu_suite"
        ) from error
    return Results(rows=rows, verdicts=verdicts)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); the file is damaged") from error


def _checked(row: Any, where: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {row!r:.50}; expected an object")
    kind = kind_of(row)
    if kind not in BY_NAME:
        raise ValueError(f"{where}: benchmark {kind!r}; expected one of {', '.join(BY_NAME)}")
    if missing := [key for key in BY_NAME[kind].keys[:1] if key not in row]:
        raise ValueError(f"{where}: a row of {kind} without {missing[0]}; is it damaged?")
    found = measured(row)
    wrong = [name for name, what in found.items() if not all(map(_is_number, what.range()))]
    if wrong or not found:
        raise ValueError(f"{where}: no number in {', '.join(wrong) or 'it'}; is it damaged?")
    return row


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def kind_of(row: dict) -> str | None:
    """The benchmark that wrote it. Two did not always say so."""
    old = "linear_logprob" if "pass" in row else "attention" if "segments" in row else None
    return row.get("benchmark", old)


def case_of(row: dict) -> tuple:
    """(benchmark, value of each of its keys that the row has)"""
    kind = kind_of(row)
    values = [row[key] for key in BY_NAME[kind].keys if key in row]
    return kind, *(" ".join(map(str, v.values())) if isinstance(v, dict) else v for v in values)


def newest(rows: list[dict]) -> dict[tuple, dict]:
    """By case the row that was written last, in the order of writing."""
    last: dict[tuple, dict] = {}
    for row in rows:
        last.pop(case_of(row), None)
        last[case_of(row)] = row
    return last


def measured(row: dict, name: str = "") -> dict[str, Measured]:
    """All that a row measured, by the path of its fields: times with `median_s`, and numbers, or
    lists of samples, whose names end with a unit."""
    found = {}
    if "median_s" in row:
        value = row["median_s"]
        low, high = row.get("p20_s", value), row.get("p80_s", value)
        found[name or "time"] = Measured(
            unit="s", value=value, low=low, high=high, least=row.get("min_s")
        )
    for key, value in row.items():
        path = f"{name} {key}".strip()
        if isinstance(value, dict):
            found |= measured(value, path)
        elif key not in STATISTICS and isinstance(value, int | float | list) and value != []:
            end = next((end for end in ENDS if key.endswith(end)), None)
            if end is not None:
                unit, scale = ENDS[end]
                low, middle, high = np.percentile(value, [20, 50, 80]) * scale
                found[path] = Measured(
                    unit=unit, value=float(middle), low=float(low), high=float(high)
                )
    return found
