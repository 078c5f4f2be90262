"""The report's reading, thinning and text, against folders made by hand."""

import html.parser
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from reinforcer_tp.events import append_event
from reinforcer_tp.report.__main__ import main
from reinforcer_tp.report.charts import build_charts
from reinforcer_tp.report.happened import MAX_EVENTS, read_events
from reinforcer_tp.report.page import json_in_html, write_report
from reinforcer_tp.report.read import ReportError, Series, read_run
from reinforcer_tp.report.tables import side_by_side
from reinforcer_tp.report.thin import extremes, smooth, stretches, window
from reinforcer_tp.train import draw_report

EVIL = '</script><img src=x onerror="document.title=1"><!--'


class Parsed(html.parser.HTMLParser):
    """A page as a browser splits it: elements, texts, and the JSON of its numbers."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text, self.scripts = [], [], []
        self._in_script = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._in_script = tag == "script"

    def handle_endtag(self, tag):
        self._in_script = False

    def handle_data(self, data):
        (self.scripts if self._in_script else self.text).append(data)

    @property
    def numbers(self) -> dict:
        return json.loads(self.scripts[0])


def make_run(folder, lines=(), config="dpo:\n  seed: 1\n"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metrics.jsonl").write_text("".join(f"{text}\n" for text in texts))
    return folder


def losses(count: int, first: int = 1) -> list[dict]:
    return [{"step": n, "train/loss": 1.0 / n} for n in range(first, first + count)]


def parse(path) -> Parsed:
    return Parsed(path.read_text(encoding="utf-8"))


def test_damaged_lines_are_counted_and_named(tmp_path):
    lines = [
        *losses(2),
        '{"step": 3, "train/loss": NaN}',
        "half a li",
        '{"step": -1, "train/loss": 1}',
        '{"step": true}',
        '{"train/loss": 1}',
        "[1]",
        '{"step": 3, "step": 4}',
        '{"step": 4, "train/loss": "0.5", "train/lr": 0.25}',
    ]
    folder = make_run(tmp_path / "run", lines)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\xfe\n" + b'{"step": 5, "x": "' + b"x" * (3 << 20) + b'"}\n')
        file.write(b'{"step": 6, "train/lr": 0.5}\n{"step": 7, "train/lr": 1.0')
    run = read_run(folder, "run")
    assert run.metrics["train/loss"].values.tolist() == [1.0, 0.5]
    assert run.metrics["train/lr"].steps.tolist() == [4, 6]
    damage, odd = run.problems
    assert "10 damaged lines" in damage
    assert "line 3 (NaN is not JSON)" in damage and "line 4" in damage and "line 9" not in damage
    assert odd == "metrics.jsonl: 1 values of train/loss are no numbers"
    page = parse(write_report([folder]))
    assert "10 damaged lines" in " ".join(page.text)


def test_a_step_that_was_computed_again_counts_once(tmp_path):
    lines = [*losses(5), {"step": 3, "train/loss": 7.0}, {"step": 4, "train/loss": None}]
    series = read_run(make_run(tmp_path / "run", lines), "run").metrics["train/loss"]
    assert series.steps.tolist() == [1, 2, 3, 4, 5]
    assert series.values[2] == 7.0 and math.isnan(series.values[3])


def test_a_folder_that_holds_no_run_is_named(tmp_path, capsys):
    with pytest.raises(ReportError, match=r"holds no run: expected .*config.yaml"):
        read_run(tmp_path, "x")
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_files_that_are_no_json_are_problems_not_failures(tmp_path):
    folder = make_run(tmp_path / "run", losses(3), config="dpo: [unclosed")
    (folder / "environment.json").write_text("[" * 5000)
    (folder / "data_report.json").write_text('{"train": {"lengths": {"bin_tokens": "x"}}}')
    (folder / "finished.json").write_text('{"steps": "many"}')
    page = parse(write_report([folder]))
    text = " ".join(page.text)
    assert "config.yaml could not be read" in text and "environment.json could not be" in text
    assert [chart["key"] for chart in page.numbers["charts"]] == ["loss"]


def test_spikes_survive_thinning():
    values = np.sin(np.arange(100_000) / 900)
    values[54_321], values[77_777], values[10] = 50.0, -60.0, np.nan
    thin = extremes(Series(np.arange(1, 100_001), values), 900)
    assert len(thin.steps) <= 900 and (np.diff(thin.steps) > 0).all()
    assert thin.values[thin.steps == 54_322] == [50.0]
    assert np.nanmin(thin.values) == -60.0 and np.isnan(thin.values[thin.steps == 11]).all()
    by_step = dict(zip(thin.steps.tolist(), thin.values.tolist(), strict=True))
    assert all(v == values[s - 1] for s, v in by_step.items() if not math.isnan(v))


def test_the_smooth_line_is_the_mean_of_the_last_values():
    values = np.random.default_rng(0).normal(size=400) + 1e16 * (np.arange(400) == 200)
    values[390] = np.inf
    series = Series(np.arange(1, 401), values)
    size = window(400)
    assert size == 8
    for at, value in zip(*vars(smooth(series, 50)).values(), strict=True):
        last = [v for v in values[max(0, at - size) : at].tolist() if math.isfinite(v)]
        assert value == pytest.approx(math.fsum(last) / len(last), rel=1e-12)
    assert window(39) == 1


def test_stretches_keep_the_total():
    series = Series(np.arange(1, 1001), np.arange(1000.0))
    thin = stretches(series, 100)
    assert len(thin.steps) == 100 and thin.steps[-1] == 1000
    assert thin.values.mean() == pytest.approx(series.values.mean())


def test_text_from_files_stays_text(tmp_path):
    folder = tmp_path / f"a{EVIL.replace('/', '')}b"
    make_run(folder, losses(60), config=json.dumps({"dpo": {"loss": EVIL}, EVIL: EVIL}))
    (folder / "environment.json").write_text(json.dumps({EVIL: [EVIL]}))
    (folder / "data_report.json").write_text(json.dumps({"train": {EVIL: EVIL, "shapes": {}}}))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 61, EVIL: 1.0}) + "\n" + json.dumps({"step": EVIL}) + "\n")
    append_event(folder, "hint", 3, EVIL)
    attempt = folder / "attempts" / "0001"
    attempt.mkdir(parents=True)
    end = {"cause": EVIL, "name": EVIL, "message": EVIL, "step": 5, "ended": 1e9}
    (attempt / "exit.json").write_text(json.dumps(end))
    other = make_run(tmp_path / "other", losses(60))
    for out in (write_report([folder]), write_report([folder, other], tmp_path / "both.html")):
        page = parse(out)
        assert "img" not in {tag for tag, _ in page.tags}
        assert sum(tag == "script" for tag, _ in page.tags) == 3
        assert not any(name.startswith("on") for _, found in page.tags for name in found)
        assert " ".join(page.text).count("onerror=") >= 8  # all of it is shown
        names = [t["name"] for chart in page.numbers["charts"] for t in chart["traces"]]
        marks = [mark["text"] for mark in page.numbers["events"]]
        # The drawing library reads tags in its labels.
        assert not any("<" in text for text in [*names, *marks, *page.numbers["runs"]])
        assert sum("&lt;img" in text for text in marks) == 2


def test_json_cannot_end_its_element():
    value = [EVIL, "\u2028&amp;<!--<script>"]
    text = json_in_html(value)
    assert not set("<>&\u2028") & set(text) and json.loads(text) == value


def test_the_page_forbids_itself_every_request(tmp_path):
    page = parse(write_report([make_run(tmp_path / "run", losses(3))]))
    [policy] = [a["content"] for t, a in page.tags if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy and "script-src 'unsafe" not in policy
    for tag, found in page.tags:
        assert not {"src", "srcset", "data", "action"} & set(found), tag
        assert found.get("href", "#").startswith("#")


def test_the_difference_of_configurations():
    columns = [("one", {"same": "1", "lr": "<b>", "old": "x"}), ("two", {"same": "1", "lr": "2"})]
    table = side_by_side(columns, differing=True)
    rows = [row.split("</th>") for row in table.split("<tbody>")[1].split("<tr>")[1:]]
    assert [row[0] for row in rows] == ["<th>lr", "<th>old"]
    assert "<td>&lt;b&gt;</td><td>2</td>" in table and "same" not in table
    assert "same" in side_by_side(columns, differing=False)


def test_several_runs_are_overlaid(tmp_path):
    first = make_run(tmp_path / "x" / "run", losses(30))
    second = make_run(tmp_path / "y" / "run", losses(20), config="dpo:\n  seed: 2\n")
    page = parse(write_report([first, second], tmp_path / "both.html"))
    [chart] = page.numbers["charts"]
    assert [trace["name"] for trace in chart["traces"]] == ["x/run train", "y/run train"]
    assert [len(trace["x"]) for trace in chart["traces"]] == [30, 20]
    assert "dpo.seed" in page.text


def test_absent_charts_are_listed_with_the_reason(tmp_path):
    lines = [line | {"perf/mfu": None} for line in losses(3)]
    run = read_run(make_run(tmp_path / "run", lines), "run")
    charts, absent = build_charts([run])
    assert [chart["key"] for chart in charts] == ["loss"]
    reasons = dict(absent)
    assert reasons["Model FLOP utilisation"] == "the peak rate of this device is not known"
    assert len(reasons) == len(absent) >= 20


def test_the_time_of_a_step_adds_up(tmp_path):
    parts = {"perf/compute_s": 3.0, "perf/optimizer_s": 1.0, "perf/data_wait_s": 0.5}
    lines = [{"step": n, "perf/step_s": 5.0 + n} | parts for n in range(1, 5)]
    folders = [make_run(tmp_path / name, lines) for name in "ab"]
    runs = [read_run(folder, folder.name) for folder in folders]
    [time] = [chart for chart in build_charts(runs[:1])[0] if chart["key"] == "time"]
    assert np.sum([trace["y"] for trace in time["traces"]], axis=0).tolist() == [6, 7, 8, 9]
    [time] = [chart for chart in build_charts(runs)[0] if chart["key"] == "time"]
    other = time["traces"][-1]
    assert other["name"] == "other" and other["x"] == [3.5, 3.5]  # of 7, 8, 9 less 4.5
    assert other["y"] == ["a", "b"]


def test_lengths_are_drawn_once_for_equal_data(tmp_path):
    lengths = {"bin_tokens": 10, "prompt": [1, 2], "chosen": [3, 0], "rejected": [0, 3]}
    folders = [make_run(tmp_path / name, losses(2)) for name in "ab"]
    for folder in folders:
        report = {"train": {"lengths": lengths, "used": 3}, "validation": None}
        (folder / "data_report.json").write_text(json.dumps(report))
    charts, absent = build_charts([read_run(folder, folder.name) for folder in folders])
    [chart] = [chart for chart in charts if chart["section"] == "Data"]
    assert [trace["y"] for trace in chart["traces"]] == [[1, 2, 0], [3, 0, 0], [0, 3, 0]]
    assert chart["traces"][0]["x"] == [0, 10, 20]
    assert "Lengths of validation pairs" in dict(absent)


def test_events_come_from_lines_and_endings(tmp_path):
    folder = make_run(tmp_path / "run", losses(9))
    for number, end in enumerate(
        [
            {"cause": "error", "name": "IO", "message": "no space", "step": 4, "ended": 20.0},
            None,
            {"cause": "stop", "name": "REQUEUE", "message": "SIGTERM", "step": 6, "ended": 1e99},
            None,
        ],
        start=1,
    ):
        attempt = folder / "attempts" / f"{number:04d}"
        attempt.mkdir(parents=True)
        (attempt / "attempt.json").write_text(json.dumps({"started": 10.0 * number + 20}))
        if end is not None:
            (attempt / "exit.json").write_text(json.dumps(end))
    append_event(folder, "save", 3, "saved somewhere")
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"step": 5, "kind": "ev')  # killed while it wrote
    append_event(folder, "resume", 3, "went on")
    problems = []
    found = read_events(folder, problems)
    kinds = {(event.kind, event.step) for event in found}
    assert kinds == {
        ("save", 3),
        ("resume", 3),
        ("failure", 4),
        ("killed", None),
        ("stop", 6),
    }  # nothing of the last attempt, which may be running
    assert [event.kind for event in found if event.time][:2] == ["failure", "killed"]
    assert len(problems) == 1 and "1 damaged lines" in problems[0]


def test_an_older_run_has_its_resumes_from_the_attempts(tmp_path):
    attempt = make_run(tmp_path / "run") / "attempts" / "0002"
    attempt.mkdir(parents=True)
    end = {"cause": "done", "message": "all", "step": 9, "start_step": 5}
    (attempt / "exit.json").write_text(json.dumps(end))
    found = read_events(tmp_path / "run", [])
    assert {(event.kind, event.step) for event in found} == {("resume", 5), ("done", 9)}


def test_very_many_events_are_bounded(tmp_path):
    folder = make_run(tmp_path / "run", losses(2))
    line = json.dumps({"time": 5.0, "step": 1, "kind": "skip", "text": "x" * 300}) + "\n"
    (folder / "events.jsonl").write_text(line * (MAX_EVENTS + 7))
    problems = []
    assert len(read_events(folder, problems)) == MAX_EVENTS
    assert problems == ["7 of 1,007 events are left out"]
    assert len(parse(write_report([folder])).numbers["events"]) <= 200


def test_events_hold_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    append_event(tmp_path, "warning", 1, "with correct-horse-battery in it")
    assert "correct-horse" not in (tmp_path / "events.jsonl").read_text()


def test_huge_runs_make_a_page_of_bounded_size(tmp_path):
    names = [name for name in METRICS_OF_A_RUN if "validation" not in name]
    rng = np.random.default_rng(0)
    folders = []
    for run in "ab":
        values = rng.normal(size=(6_000, len(names)))
        lines = (
            json.dumps({"step": i + 1} | dict(zip(names, row, strict=True)))
            for i, row in enumerate(values.tolist())
        )
        folders.append(make_run(tmp_path / run, lines))
    out = write_report(folders, tmp_path / "both.html")
    numbers = parse(out).numbers
    assert out.stat().st_size < 8e6
    for chart in numbers["charts"]:
        assert 1000 < sum(len(trace["x"]) for trace in chart["traces"]) < 8000, chart["key"]


METRICS_OF_A_RUN = [
    f"{part}/{name}"
    for part in ("train", "validation")
    for name in (
        *("loss", "preference_loss", "sft_loss", "rewards/chosen", "rewards/rejected"),
        *("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "grad_norm"),
        *("health/chosen_drift", "health/rejected_drift", "kl/chosen_k3", "kl/rejected_k3"),
    )
]


def ended(folder, rank=0, start_step=0) -> SimpleNamespace:
    """`lifecycle.stops.Stops` at the end of a run, as far as the drawing looks at it."""
    ending = SimpleNamespace(rank=rank, attempt=SimpleNamespace(log_dir=folder))
    return SimpleNamespace(ending=ending, position=SimpleNamespace(start_step=start_step))


def test_a_failure_to_draw_is_one_line(tmp_path, capsys):
    folder = make_run(tmp_path / "run", losses(3))
    (folder / "report.html").mkdir()
    draw_report(ended(folder))
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: no report.html was drawn: ") and "report.html" in line
    (folder / "report.html").rmdir()
    draw_report(ended(folder, rank=1))
    draw_report(ended(folder, start_step=None))  # no step was tried
    assert not (folder / "report.html").exists()
    draw_report(ended(folder))
    assert (folder / "report.html").is_file()


def test_the_plotting_package_is_not_imported(tmp_path):
    write_report([make_run(tmp_path / "run", losses(2))])
    assert "plotly" not in sys.modules
