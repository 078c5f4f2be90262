"""One HTML page that needs no network: it holds the drawing library, the numbers and the text.

A Content-Security-Policy of the page itself forbids every request and every script but its own.
"""

import base64
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from reinforcer_tp.report import tables
from reinforcer_tp.report.catalogue import CHARTS, EXTRA_METRICS, SECTIONS, STEP_S, TIME_PARTS
from reinforcer_tp.report.charts import Absent, build_charts, plain_label
from reinforcer_tp.report.happened import Event, read_events
from reinforcer_tp.report.read import ReportError, RunFolder, read_run, shorten
from reinforcer_tp.whole_files import write_whole

_HERE = Path(__file__).parent
_MAX_MARKS = 200  # events of a run that are marked on the charts
_MAX_RUNS = 16


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Draws the run folders `folders` into the file `out`; None: report.html of the only run.

    ReportError for what a user can mend, OSError where `out` cannot be written.
    """
    if not 1 <= len(folders) <= _MAX_RUNS:
        raise ReportError(f"{len(folders)} run folders, expected 1 to {_MAX_RUNS}")
    assert out is not None or len(folders) == 1, "a page of several runs needs a file"
    runs, events = [], []
    for folder, name in zip(folders, _names(folders), strict=True):
        run, problems = read_run(folder, name), []
        events.append(read_events(folder, problems))
        runs.append(replace(run, problems=(*run.problems, *problems)))
    out = out or folders[0] / "report.html"
    write_whole(out, page(runs, events).encode(errors="replace"))
    return out


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with those above them as far as two would be alike."""
    for depth in range(1, 20):
        names = [shorten("/".join(folder.resolve().parts[-depth:]), 80) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {name}" for number, name in enumerate(names, start=1)]


def page(runs: Sequence[RunFolder], events: Sequence[Sequence[Event]]) -> str:
    charts, absent = build_charts(runs)
    numbers = {
        "runs": [plain_label(run.name) for run in runs],
        "charts": charts,
        "events": _marks(events),
    }
    title = escape(" / ".join(run.name for run in runs))
    scripts = [_drawing_library(), (_HERE / "page.js").read_text(encoding="utf-8")]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n"
        f"<style>{(_HERE / 'page.css').read_text(encoding='utf-8')}</style></head>\n"
        f"<body>{_body(runs, events, charts, absent)}\n"
        f'<script type="application/json" id="numbers">{json_in_html(numbers)}</script>\n'
        + "".join(f"<script>{script}</script>\n" for script in scripts)
        + "</body></html>\n"
    )


def json_in_html(value: Any) -> str:
    """JSON that cannot end the script element around it, or begin a comment or another one."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _drawing_library() -> str:
    """plotly.js, as the Python package carries it; the package itself is not imported."""
    found = importlib.util.find_spec("plotly")
    if found is None or not found.submodule_search_locations:
        raise ReportError("the package plotly is not installed; pip install plotly")
    file = Path(found.submodule_search_locations[0], "package_data", "plotly.min.js")
    text = file.read_text(encoding="utf-8").replace("\r\n", "\n")
    assert "</script" not in text.lower(), file
    return text


def _policy(scripts: Sequence[str]) -> str:
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _marks(events: Sequence[Sequence[Event]]) -> list[dict[str, Any]]:
    """Events with a step, for the charts; of very many the ones that matter most."""
    marks = []
    for number, found in enumerate(events):
        known = [event for event in found if event.step is not None and event.kind != "done"]
        known.sort(key=lambda event: event.kind in ("save", "skip"))
        marks += [
            {
                "run": number,
                "step": e.step,
                "kind": e.kind,
                "text": plain_label(shorten(e.text, 160)),
            }
            for e in known[:_MAX_MARKS]
        ]
    return marks


def _body(
    runs: Sequence[RunFolder],
    events: Sequence[Sequence[Event]],
    charts: Sequence[dict[str, Any]],
    absent: Sequence[Absent],
) -> str:
    sections = {
        name: _grid([chart for chart in charts if chart["section"] == name]) for name in SECTIONS
    }
    sections["Data"] += tables.data_table(runs)
    sections["Events"] = tables.events_table(runs, events)
    sections["Configuration"] = tables.config_tables(runs)
    sections["Environment"] = tables.environment_table(runs)
    left_out = [*absent, *_not_drawn(runs)]
    if left_out:
        sections["Not shown"] = tables.listing(left_out)
    sections = {name: content for name, content in sections.items() if content}
    anchors = {name: name.lower().replace(" ", "-") for name in sections}
    links = "".join(f'<a href="#{anchors[name]}">{name}</a>' for name in sections)
    parts = "".join(
        f'<section id="{anchors[name]}"><h2>{name}</h2>{content}</section>'
        for name, content in sections.items()
    )
    return f"{_header(runs)}<nav>{links}</nav><main>{parts}</main>{_footer()}"


def _header(runs: Sequence[RunFolder]) -> str:
    names = " <i>and</i> ".join(escape(run.name) for run in runs)
    about = "" if len(runs) > 1 else f"<p>{_summary(runs[0])}</p>"
    problems = [(run.name, problem) for run in runs for problem in run.problems]
    damage = f'<div class="damage">{tables.listing(problems)}</div>' if problems else ""
    return f"<header><h1>{names}</h1>{about}{tables.headline(runs)}{damage}</header>"


def _summary(run: RunFolder) -> str:
    """Model, loss and layout in a line, as far as they are known."""
    keys = {
        "policy.model_name": "{}",
        "dpo.preference_loss": "loss {}",
        "dpo.reference_policy_kl_penalty": "beta {}",
        "policy.megatron_cfg.optimizer.lr": "lr {}",
        "policy.train_global_batch_size": "{} pairs a step",
        "policy.precision": "{}",
    }
    known = [text.format(run.config[key]) for key, text in keys.items() if key in run.config]
    layout = run.environment.get("layout")
    if isinstance(layout, dict):
        size = layout.get("world_size")
        known.append("1 process" if size == 1 else f"{size} processes")
    return escape(shorten(", ".join(known), 300))


def _footer() -> str:
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return f"<footer>drawn by reinforcer_tp.report, {now}; charts: plotly.js</footer>"


def _grid(charts: Sequence[dict[str, Any]]) -> str:
    figures = "".join(
        f"<figure><figcaption><h3>{chart['title']}</h3><p>{escape(chart['note'])}</p></figcaption>"
        f'<div class="chart" id="chart-{chart["key"]}"></div></figure>'
        for chart in charts
    )
    return f'<div class="grid">{figures}</div>' if figures else ""


def _not_drawn(runs: Sequence[RunFolder]) -> list[Absent]:
    drawn = {line.metric for chart in CHARTS for line in chart.lines} | EXTRA_METRICS | {STEP_S}
    drawn |= {line.metric for line in TIME_PARTS}
    extra = sorted({name for run in runs for name in run.metrics} - drawn)
    # Of validation there are more than charts: they are in metrics.jsonl.
    shown = ", ".join(shorten(name, 80) for name in extra[:50]) + ", ..." * (len(extra) > 50)
    return [("Other metrics", f"of metrics.jsonl: {shown}")] if extra else []
