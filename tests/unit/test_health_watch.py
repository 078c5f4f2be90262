"""When a run hears about its health, and what it is told."""

from __future__ import annotations

import math
import re

import pytest

from reinforcer_tp.health import HealthWatch


def watch(**options) -> HealthWatch:
    return HealthWatch(**{"beta": 0.1, "sft_loss_weight": 0.0, "losses": ("sigmoid",)} | options)


GOOD = {
    "train/health/chosen_down": 0.4,
    "train/health/chosen_drift": 0.05,
    "train/health/length_bias": 0.1,
    "train/health/saturated": 0.2,
    "train/kl/chosen_k3": 0.02,
    "train/entropy": 2.0,
    "train/num_pairs": 16,
    "train/grad_norm": math.inf,
}
DOWN = GOOD | {"train/health/chosen_down": 0.71, "train/health/chosen_drift": -0.8}


def spoken(health: HealthWatch, steps) -> list[tuple[int, str]]:
    """(step, first words of the line) over `steps`, a list of metrics."""
    return [
        (step, line)
        for step, metrics in enumerate(steps, start=1)
        for line in health.hints(step, metrics)
    ]


def test_a_healthy_run_hears_nothing():
    assert spoken(watch(), [GOOD] * 40) == []
    assert spoken(watch(), [{"train/loss": 0.5}] * 40) == []


def test_displacement_in_plain_words():
    assert spoken(watch(), [DOWN] * 40) == [
        (
            10,
            "step 10: over the last 10 steps the chosen responses were less likely than under the "
            "reference (71 % of pairs, -0.80 nats a token). The loss trains only the difference to "
            "the rejected ones; to hold the chosen up add dpo.sft_loss_weight=0.1, or try "
            "dpo.preference_loss=apo_zero",
        )
    ]


def test_displacement_knows_the_loss():
    ((_, line),) = spoken(watch(losses=["apo_zero"], sft_loss_weight=0.2), [DOWN] * 10)
    assert line.endswith("To hold them up raise dpo.sft_loss_weight (now 0.2)")
    assert spoken(watch(losses=["apo_down"]), [DOWN] * 40) == []  # lowers them on purpose


@pytest.mark.parametrize(
    ("metric", "bad", "words"),
    [
        ("health/length_bias", 0.6, "how much longer the chosen .* dpo.ld_alpha=0.5"),
        ("health/length_bias", -0.6, r"how much shorter the chosen .* \(correlation -0.53\)"),
        ("health/saturated", 0.95, "95 % of pairs were decided .* dpo.label_smoothing=0.1"),
        ("kl/chosen_k3", 1.5, r"1.50 nats a token by k3.* raise \S+_kl_penalty \(now 0.1\)"),
        ("entropy", 0.4, r"nearly certain .* 0.400 nats, at first 2.000\)"),
    ],
)
def test_each_condition_speaks_alone(metric, bad, words):
    steps = [GOOD] + [GOOD | {f"train/{metric}": bad}] * 30
    ((step, line),) = spoken(watch(), steps)
    assert line.startswith(f"step {step}: over the last 10 steps ") and "\n" not in line
    assert re.search(words, line)


def test_advice_fits_the_loss():
    bias = [GOOD | {"train/health/length_bias": 0.6}] * 10
    for options in ({"losses": ["simpo"]}, {"averages": True}):
        ((_, line),) = spoken(watch(**options), bias)
        assert "per token already" in line and "ld_alpha" not in line
    saturated = [GOOD | {"train/health/saturated": 1.0}] * 10
    ((_, line),) = spoken(watch(losses=["hinge"]), saturated)
    assert "label_smoothing" not in line
    assert spoken(watch(losses=["ipo"]), saturated) == []


def test_a_mean_over_the_window_is_judged():
    """Entropy 2 at first, then 0.4: the mean of 10 steps is under 0.5 with one 2 less."""
    steps = [GOOD] * 5 + [GOOD | {"train/entropy": 0.4}] * 20
    ((step, _),) = spoken(watch(), steps)
    assert step == 5 + 10  # with one 2.0 left in the window the mean is 0.56
    assert spoken(watch(), [GOOD] * 15 + [DOWN] + [GOOD] * 15) == []


def test_one_wild_step_does_not_raise_the_distance():
    wild = GOOD | {"train/kl/chosen_k3": 1e6}
    assert spoken(watch(), [GOOD] * 9 + [wild] + [GOOD] * 9) == []


def test_few_pairs_have_no_length_bias():
    for num_pairs, lines in ((6, 0), (7, 1)):  # 60 and 70 pairs in the window
        steps = [GOOD | {"train/health/length_bias": 0.9, "train/num_pairs": num_pairs}] * 20
        assert len(spoken(watch(), steps)) == lines


def test_speaks_again_only_after_it_recovered():
    flicker = [DOWN] * 10 + ([GOOD] * 8 + [DOWN] * 8) * 4  # never absent for 10 steps
    assert [step for step, _ in spoken(watch(), flicker)] == [10]
    back = [DOWN] * 10 + [GOOD] * 30 + [DOWN] * 10
    first, second = (step for step, _ in spoken(watch(), back))
    assert first == 10 and 40 < second <= 50


def test_steps_without_a_number_are_not_judged():
    for missing in (None, math.nan):
        gap = DOWN | {"train/health/chosen_drift": missing}
        steps = [DOWN] * 9 + [gap] + [DOWN] * 9
        assert spoken(watch(), steps) == []
