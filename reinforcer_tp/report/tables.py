"""The text of the page as HTML; whatever comes from a file goes through `cell` or `escape`."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

import numpy as np

from reinforcer_tp.report.happened import Event
from reinforcer_tp.report.read import RunFolder, Series, flatten, shorten
from reinforcer_tp.report.thin import mean

_ABSENT = '<span class="none">&ndash;</span>'
_LAST_SHARE = 20  # the last twentieth of the steps is "the end" of training
_MAX_ROWS = 500  # of the table of events


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table in a box of its own that scrolls; `rows` are HTML, `head` is text."""
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    inside = f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{inside}</table></div>'


def cell(text: str | None) -> str:
    return f"<td>{_ABSENT if text is None else escape(text)}</td>"


def side_by_side(columns: Sequence[tuple[str, Mapping[str, str]]], *, differing: bool) -> str:
    """Rows are keys, columns (title, key -> text); `differing`: only keys whose texts differ."""
    keys = list(dict.fromkeys(key for _, column in columns for key in column))
    if differing:
        keys = [key for key in keys if len({column.get(key) for _, column in columns}) > 1]
    rows = [[f"<th>{escape(key)}</th>", *(cell(c.get(key)) for _, c in columns)] for key in keys]
    return table(["", *(title for title, _ in columns)], rows, "keys")


def headline(runs: Sequence[RunFolder]) -> str:
    """The numbers that matter: cards for one run, a table for several."""
    numbers = [_numbers(run) for run in runs]
    if len(runs) > 1:
        rows = [
            [f'<th><i class="run run{i % 8}"></i>{escape(run.name)}</th>', *map(_value_cell, found)]
            for i, (run, found) in enumerate(zip(runs, numbers, strict=True))
        ]
        return table(["run", *(label for label, *_ in numbers[0])], rows, "headline")
    cards = "".join(
        f'<div class="card"><span>{escape(label)}</span><b>{_ABSENT if text is None else text}</b>'
        f"<small>{escape(note)}</small></div>"
        for label, text, note in numbers[0]
    )
    return f'<div class="cards">{cards}</div>'


def _value_cell(number: tuple[str, str | None, str]) -> str:
    _, text, note = number
    return f"<td>{_ABSENT if text is None else text}<small>{escape(note)}</small></td>"


def _numbers(run: RunFolder) -> list[tuple[str, str | None, str]]:
    """(label, number or None, what it is)."""
    losses = run.metrics.get("train/loss")
    num_steps = int(losses.steps[-1]) if losses is not None else 0
    state = "finished" if run.finished_steps == num_steps else "not finished"
    return [
        _learnt(run, "Loss", "loss", ".4f"),
        _learnt(run, "Accuracy", "rewards/accuracies", ".3f"),
        _learnt(run, "Reward margin", "rewards/margins", ".3f"),
        _speed(run, "Pairs per second", "perf/pairs_per_s"),
        ("Peak memory", _largest(run.metrics.get("memory/peak_gib")), "GiB, rank 0"),
        ("Steps", f"{num_steps:,}" if num_steps else None, state),
    ]


def _learnt(run: RunFolder, label: str, metric: str, form: str) -> tuple[str, str | None, str]:
    """The last validation's value, and the end of training beside it."""
    train = run.metrics.get(f"train/{metric}")
    end, note = None, ""
    if train is not None:
        num = max(1, len(train.values) // _LAST_SHARE)
        end = _number(mean(train.values[-num:]), form)
        note = f"train, last {num} steps" if num > 1 else "train, last step"
    found = run.metrics.get(f"validation/{metric}")
    last = None if found is None else _number(float(found.values[-1]), form)
    if last is None:
        return label, end, note
    return label, last, f"validation; {end} {note}" if end is not None else "validation"


def _speed(run: RunFolder, label: str, metric: str) -> tuple[str, str | None, str]:
    found = run.metrics.get(metric)
    if found is None:
        return label, None, ""
    values = found.values[1:] if len(found.values) > 2 else found.values
    values = values[np.isfinite(values)]
    return label, _number(float(np.median(values)), ",.1f") if len(values) else None, "median"


def _largest(series: Series | None) -> str | None:
    if series is None or not np.isfinite(series.values).any():
        return None
    return _number(float(np.nanmax(series.values)), ",.2f")


def _number(value: float, form: str) -> str | None:
    if not np.isfinite(value):
        return None
    return format(value, form) if abs(value) < 1e9 else f"{value:.3e}"


def data_table(runs: Sequence[RunFolder]) -> str:
    columns = []
    for run in runs:
        whole = {key: value for key, value in run.data.items() if not isinstance(value, dict)}
        for split in ("train", "validation"):
            found = run.data.get(split)
            if isinstance(found, dict):
                shown = {key: value for key, value in found.items() if key != "lengths"}
                title = split if len(runs) == 1 else f"{run.name} {split}"
                columns.append((title, _spaced(flatten(whole | shown))))
    return side_by_side(columns, differing=False) if columns else _nothing("data_report.json")


def _spaced(texts: Mapping[str, str]) -> dict[str, str]:
    return {key.replace("_", " ").replace(".", ": "): text for key, text in texts.items()}


def environment_table(runs: Sequence[RunFolder]) -> str:
    columns = [(_title(runs, run), flatten(run.environment)) for run in runs if run.environment]
    return side_by_side(columns, differing=False) if columns else _nothing("environment.json")


def config_tables(runs: Sequence[RunFolder]) -> str:
    """What differs between runs, and the whole of it, folded."""
    columns = [(_title(runs, run), run.config) for run in runs if run.config]
    if not columns:
        return _nothing("config.yaml")
    diff = ""
    if len(columns) > 1:
        diff = side_by_side(columns, differing=True)
        if "<td>" not in diff:
            diff = "<p>All keys are the same.</p>"
    whole = side_by_side(columns, differing=False)
    return f"{diff}<details><summary>all keys</summary>{whole}</details>"


def _title(runs: Sequence[RunFolder], run: RunFolder) -> str:
    return run.name if len(runs) > 1 else "value"


def _nothing(file: str) -> str:
    return f"<p>There is no {file}, or it is empty.</p>"


def events_table(runs: Sequence[RunFolder], events: Sequence[Sequence[Event]]) -> str:
    """Newest last; of very many the last ones."""
    rows = [
        (event.time or 0.0, run.name, event)
        for run, found in zip(runs, events, strict=True)
        for event in found
    ]
    if not rows:
        return "<p>No event was recorded.</p>"
    rows.sort(key=lambda row: row[0])
    shown = rows[-_MAX_ROWS:]
    head = ["time, UTC", *(["run"] if len(runs) > 1 else []), "step", "event", ""]
    left_out = f"<p>{len(rows) - len(shown):,} earlier events are left out.</p>"
    body = table(head, (_event_row(*row[1:], len(runs) > 1) for row in shown), "events")
    return (left_out if len(rows) > len(shown) else "") + body


def _event_row(name: str, event: Event, is_named: bool) -> list[str]:
    step = None if event.step is None else f"{event.step:,}"
    kind = f'<td><span class="kind {event.kind}">{event.kind}</span></td>'
    named = [cell(shorten(name, 60))] if is_named else []
    return [cell(_moment(event.time)), *named, cell(step), kind, cell(event.text)]


def _moment(time: float | None) -> str | None:
    return None if time is None else f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S}"


def listing(lines: Iterable[tuple[str, Any]]) -> str:
    items = (f"<li><b>{escape(str(what))}</b> {escape(str(why))}</li>" for what, why in lines)
    return f"<ul>{''.join(items)}</ul>"
