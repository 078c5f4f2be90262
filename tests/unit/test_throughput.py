"""Rates of a step and the panel, against numbers computed by hand."""

from __future__ import annotations

import pytest

from reinforcer_tp.throughput import Throughput, step_rates

RATES = {
    "step_s": 0.5,
    "num_tokens": 900,
    "num_slots": 1000,
    "num_pairs": 8,
    "flops": 4e14,
    "world_size": 4,
}


def test_step_rates():
    expected = {
        "perf/tokens_per_s": 1800.0,
        "perf/padded_tokens_per_s": 2000.0,
        "perf/pairs_per_s": 16.0,
        "perf/tflops_per_gpu": 200.0,  # 4e14 / 0.5 s / 4 devices
    }
    assert step_rates(**RATES, peak_tflops=None) == pytest.approx(expected)
    assert step_rates(**RATES, peak_tflops=800.0) == pytest.approx(expected | {"perf/mfu": 0.25})


def step(step_s=1.0, reference=0.0, wait=0.1, compute=0.5, optimizer=0.3, rate=100.0, peak=2.0):
    return {
        "train/loss": 0.5,
        "perf/step_s": step_s,
        "perf/reference_s": reference,
        "perf/data_wait_s": wait,
        "perf/compute_s": compute,
        "perf/optimizer_s": optimizer,
        "perf/tokens_per_s": rate,
        "memory/peak_gib": peak,
    }


def rows(throughput: Throughput) -> dict[str, list[str]]:
    """Label -> the cells after it."""
    lines = (
        throughput.panel().replace("\u2503", "\u2502").splitlines()
    )  # vertical lines of the table
    table = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in lines]
    return {cells[0]: cells[1:] for cells in table if cells}


def test_panel_shows_medians_without_the_first_step():
    throughput = Throughput()
    throughput.add(step(step_s=60.0, wait=50.0, rate=1.0, peak=9.0))  # compiles and warms up
    for step_s, compute, rate in ((1.0, 0.5, 90.0), (3.0, 2.0, 3000.0), (1.25, 0.75, 1200.0)):
        throughput.add(step(step_s=step_s, compute=compute, rate=rate))
    assert throughput.panel().splitlines()[0].rstrip() == (
        "throughput: median of 3 steps, the first left out"
    )
    assert rows(throughput) == {
        "rank 0": ["median", "of a step"],
        "step": ["1.250 s", ""],
        "reference": ["0.000 s", "0.0%"],
        "data wait": ["0.100 s", "8.0%"],
        "compute": ["0.750 s", "60.0%"],
        "optimizer": ["0.300 s", "24.0%"],
        "other": ["0.100 s", "8.0%"],  # 0.1, 0.6 and 0.1 s
        "tokens/s": ["1,200", ""],
        "peak memory, GiB": ["9.00", ""],  # the largest of all steps
    }


@pytest.mark.parametrize(
    ("count", "title", "step_s"),
    [
        (1, "1 step", "4.000 s"),
        (2, "2 steps", "2.500 s"),
        (3, "2 steps, the first left", "1.000 s"),
    ],
)
def test_a_short_run_keeps_its_first_step(count, title, step_s):
    throughput = Throughput()
    for seconds in (4.0, 1.0, 1.0)[:count]:
        throughput.add(step(step_s=seconds))
    assert throughput.panel().startswith(f"throughput: median of {title}")
    assert rows(throughput)["step"] == [step_s, ""]


def test_the_sweep_before_training_is_no_part_of_a_step():
    throughput = Throughput(sweep_s=1234.5)
    throughput.add(step(reference=0.05))
    found = rows(throughput)
    assert found["reference"] == ["0.050 s", "5.0%"]
    assert found["other"] == ["0.050 s", "5.0%"]
    assert found["reference, before training"] == ["1,234.50 s", ""]


def test_panel_of_what_there_is():
    assert Throughput().panel() == ""
    throughput = Throughput()
    throughput.add({"perf/step_s": 2.0, "perf/mfu": 0.4375, "perf/tokens_per_s": None})
    found = rows(throughput)
    assert found == {
        "rank 0": ["median", "of a step"],
        "step": ["2.000 s", ""],
        "MFU": ["43.8%", ""],
    }
