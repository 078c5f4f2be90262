"""The bars of benchmarks.step_scaling, on rows made by hand."""

import numpy as np
import pytest

from benchmarks import step_scaling
from benchmarks.vs_trl_runs import Watched


def scaling(times: int, step_s: float, peak_gib: float) -> dict:
    seconds = {"median_s": step_s}
    return {
        "what": "scaling", "times": times, "tokens": 1000 * times, "peak_gib": peak_gib,
        "step": seconds, "compute": seconds,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "met"),
    [
        ([scaling(1, 2.0, 3.0), scaling(2, 4.3, 3.1), scaling(4, 7.0, 3.0)], [True] * 4),
        ([scaling(1, 2.0, 3.0), scaling(2, 4.5, 3.0)], [False, True]),  # 1.125 a token
        ([scaling(1, 2.0, 3.0), scaling(2, 4.0, 3.2)], [True, False]),
    ],
)
def test_time_is_linear_and_memory_flat(rows, met):
    assert [verdict for verdict, _ in step_scaling.verdicts(rows)] == met


def test_growth_that_goes_on_is_found():
    generator = np.random.default_rng(0)
    noise = generator.normal(0, 2, 200)
    warming = 800 + 100 * (1 - np.exp(-np.arange(200) / 10)) + noise
    leaking = warming + 0.3 * np.arange(200)

    def verdict(held):
        row = {"what": "growth", "steps": 200} | step_scaling.growth(held)
        ((met, _),) = step_scaling.verdicts([scaling(1, 1.0, 1.0), row])
        return met, row["slope_kib_a_step"]

    met, slope = verdict(warming)
    assert met and abs(slope) < 20
    met, slope = verdict(leaking)
    assert not met and slope == pytest.approx(0.3 * 1024, abs=20)


def test_memory_is_read_at_the_end_of_each_step():
    watched = Watched(
        stamps=[1.0, 2.5], peak_gib=1.0, held_kib=[(0.0, 1024), (2.0, 3072), (3.0, 5120)]
    )
    assert step_scaling.held_after_steps(watched).tolist() == [2.0, 4.0]


def test_steps_of_other_tokens_are_refused():
    args = step_scaling._parse(["--model", "m", "--data", "d"])
    step = {"perf/step_s": 2.0, "perf/compute_s": 1.5, "train/num_tokens": 2000}
    row = step_scaling._scaling_row(args, 2, 1000, [([step | {"perf/step_s": 9.0}, step], 3.0)])
    assert row["step"]["median_s"] == 2.0 and row["peak_gib"] == 3.0 and row["pairs"] == 8
    with pytest.raises(ValueError, match=r"4x: steps of \[2000\] tokens, expected 4000"):
        step_scaling._scaling_row(args, 4, 1000, [([step, step], 3.0)])
