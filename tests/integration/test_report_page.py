"""The report of a real run, as a real browser shows it: drawn, alone, readable, light and dark."""

import json
import os
import shutil
from pathlib import Path

import pytest

from reinforcer_tp.events import append_event
from reinforcer_tp.report.browser import DRAWN, Browser, find_browser
from reinforcer_tp.report.page import write_report
from tests.integration.harness import run_train

EVIL = '</script><img src=x onerror="document.title=1">'
PHONE = (390, 844)
STEPS = 44
# Of each chart: traces with data, those whose line or bars are there, marks of events.
DRAWN_MARKS = """
[...document.querySelectorAll(".chart")].map((box) => ({
  id: box.id,
  traces: box.data.filter((t) => t.yaxis !== "y2" && t.y.some((y) => y !== null)).length,
  lines: [...box.querySelectorAll(".scatterlayer .trace")].filter((trace) =>
    !trace.closest(".xy2") && [...trace.querySelectorAll("path")].some((path) => {
      const size = path.getBBox();
      return path.getAttribute("d").length > 8 && size.width + size.height > 0;
    })).length + new Set([...box.querySelectorAll(".barlayer .trace")].filter((trace) =>
      trace.querySelector("path[d]"))).size,
  events: box.querySelectorAll(".xy2 .points path").length,
  width: box.querySelector("svg").getBoundingClientRect().right,
}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a short run of the embedded default, which has drawn its own report."""
    log_dir = tmp_path_factory.mktemp("report") / "run"
    result = run_train(
        [
            *("policy.train_global_batch_size=4", "dpo.val_global_batch_size=8"),
            *(f"dpo.max_num_steps={STEPS}", "dpo.val_batches=2", "checkpointing.enabled=true"),
            *("checkpointing.save_period=20", "checkpointing.export_hf=false"),
        ],
        log_dir=log_dir,
        nproc=None,
        fork=True,
    )
    assert result.returncode == 0, result.describe()
    assert f"report:         {log_dir / 'report.html'}" in result.stdout
    return log_dir


@pytest.fixture(scope="module")
def browser():
    if find_browser() is None:
        message = "no Chromium: apt-get install chromium"
        if os.environ.get("REQUIRE_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def comparison(run, tmp_path_factory) -> Path:
    """A page of the run and of one that differs in its names, texts and a few numbers."""
    folder = tmp_path_factory.mktemp("comparison") / EVIL.replace("/", "")
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints", "report.html"))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("seed: 42", f"seed: '{EVIL}'"))
    report = json.loads((folder / "data_report.json").read_text())
    report["train"]["lengths"]["chosen"][0] += 1
    (folder / "data_report.json").write_text(json.dumps(report))
    append_event(folder, "hint", 12, EVIL)
    return write_report([run, folder], folder.parent / "both.html")


def show(browser: Browser, page: Path, width=1240, height=900, **how) -> None:
    """Opens the page, unless it is what was opened last, and nothing but looked at since."""
    wanted = (page, width, height, how)
    if wanted == getattr(browser, "shown", None):
        return
    browser.events.clear()
    browser.show(width, height, **how)
    browser.open(page, DRAWN)
    browser.shown = wanted


def complaints(browser: Browser) -> list[dict]:
    browser.value("0")  # what was told until now has arrived
    methods = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    return [event for event in browser.events if event.get("method") in methods]


def requests(browser: Browser) -> list[str]:
    sent = [e for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    return [event["params"]["request"]["url"] for event in sent]


def check_phone(browser: Browser) -> None:
    """Makes the window of the open page that of a phone: only tables scroll sideways, in a box."""
    browser.shown = None
    browser.show(*PHONE, phone=True)
    right = (
        '[...document.querySelectorAll(".chart svg")].map((s) => s.getBoundingClientRect().right)'
    )
    browser.wait(f"Math.max(...{right}) <= {PHONE[0]}")
    widths = "[document.documentElement.scrollWidth, innerWidth]"
    assert browser.value(widths) == [PHONE[0], PHONE[0]]
    charts = check_charts(browser, 22)
    assert min(chart["width"] for chart in charts) > 0.8 * PHONE[0]
    boxes = '[...document.querySelectorAll(".scroll")]'
    assert browser.value(f"{boxes}.some((box) => box.scrollWidth > box.clientWidth)")
    assert complaints(browser) == []


def check_charts(browser: Browser, at_least: int) -> list[dict]:
    charts = browser.value(DRAWN_MARKS)
    assert len(charts) >= at_least
    for chart in charts:
        assert chart["traces"] > 0 and chart["lines"] == chart["traces"], chart
    return charts


def test_every_chart_of_a_real_run_has_data(run, browser):
    show(browser, run / "report.html")
    charts = check_charts(browser, 22)
    assert complaints(browser) == []
    assert requests(browser) == [(run / "report.html").as_uri()]
    by_steps = [chart for chart in charts if not chart["id"].startswith("chart-lengths")]
    assert len(by_steps) == len(charts) - 2
    for chart in by_steps:
        assert chart["events"] >= 3, chart  # saves after 20, 40 and 44 steps
    hints = (run / "events.jsonl").read_text().count('"kind": "hint"')
    assert browser.value('document.querySelectorAll("#events tbody tr").length') == 4 + hints


def test_the_lines_are_the_numbers_of_the_run(run, browser):
    show(browser, run / "report.html")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    raw = 'document.getElementById("chart-%s").data.filter((t) => t.%s)[0]'
    for key, metric in (("loss", "train/loss"), ("margin", "train/rewards/margins")):
        trace = browser.value(raw % (key, "showlegend === false"))
        known = {line["step"]: line[metric] for line in lines if metric in line}
        assert trace["x"] == list(known) == list(range(1, STEPS + 1))
        assert trace["y"] == pytest.approx(list(known.values()), rel=1e-4, abs=1e-9)
    trace = browser.value(raw % ("accuracy", 'name === "validation"'))
    metric = "validation/rewards/accuracies"
    assert trace["x"] == [0, 10, 20, 30, 40, STEPS]
    known = [line[metric] for line in lines if metric in line]
    assert trace["y"] == pytest.approx(known, rel=1e-4)
    card = browser.value('document.querySelectorAll(".card b")[1].textContent')
    assert card == f"{known[-1]:.3f}"


def test_hovering_shows_the_values_of_all_lines_at_a_step(run, browser):
    show(browser, run / "report.html")
    box = browser.value(
        'document.querySelector("#chart-rewards .nsewdrag").getBoundingClientRect().toJSON()'
    )
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for shift in (0, 1):
        browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x + shift, y=y)
    hover = 'document.querySelector("#chart-rewards .hoverlayer").textContent'
    browser.wait(f"{hover} !== ''")
    text = browser.value(hover)
    assert "step 2" in text and "chosen train" in text and "rejected train" in text


def test_zooming_one_chart_zooms_all(run, browser):
    show(browser, run / "report.html")
    browser.value(
        'Plotly.relayout("chart-loss", {"xaxis.range[0]": 5, "xaxis.range[1]": 15}).then(() => 1)'
    )
    shown = 'document.getElementById("chart-%s").layout.xaxis.range'
    browser.wait(f"({shown % 'memory'} ?? [])[1] === 15")
    assert browser.value(shown % "lengths_train")[1] != 15  # its axis counts tokens


def test_a_phone_scrolls_in_one_direction_only(run, browser):
    show(browser, run / "report.html")
    check_phone(browser)


def test_dark_colours_come_while_the_page_is_open(run, browser):
    show(browser, run / "report.html")
    colours = """[getComputedStyle(document.body).backgroundColor,
        getComputedStyle(document.querySelector("#chart-loss .xtick text")).fill,
        document.querySelector("#chart-loss .js-line").style.stroke]"""
    light = browser.value(colours)
    browser.shown = None  # as nothing else expects it
    browser.show(1240, 900, dark=True)
    browser.wait('document.documentElement.dataset.theme === "dark"')
    dark = browser.value(colours)
    assert all(before != after for before, after in zip(light, dark, strict=True))

    def brightness(colour: str) -> int:
        return sum(map(int, colour[colour.index("(") + 1 : -1].split(",")[:3]))

    assert brightness(light[0]) > 600 > 200 > brightness(dark[0])
    assert brightness(light[1]) < 200 < 600 < brightness(dark[1])


def test_the_page_may_load_nothing(run, browser):
    show(browser, run / "report.html")
    refused = browser.value(
        """new Promise((resolve) => {
          document.addEventListener("securitypolicyviolation", (e) => resolve(e.violatedDirective));
          new Image().src = "http://127.0.0.1:9/x.png";
        })"""
    )
    assert refused == "img-src"


def test_several_runs_lie_over_each_other(run, comparison, browser):
    show(browser, comparison)
    check_charts(browser, 22)
    assert complaints(browser) == [] and requests(browser) == [comparison.as_uri()]
    names = browser.value(
        '[...document.querySelectorAll("#chart-loss .legendtext")].map((text) => text.textContent)'
    )
    evil = EVIL.replace("/", "")
    assert names == ["run train", "run validation", f"{evil} train", f"{evil} validation"]
    rows = browser.value('document.querySelector("#configuration table").innerText')
    assert EVIL in rows and "dpo.seed" in rows and "dpo.max_num_steps" not in rows
    assert browser.value("document.images.length") == 0
    assert browser.value("document.title") != "1"
    check_phone(browser)


def test_no_process_of_the_browser_is_left():
    if find_browser() is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with Browser() as opened:
        profile = opened._profile.name
        assert of_profile(profile)
    assert not of_profile(profile) and not Path(profile).exists()


def of_profile(profile: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if profile.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found
