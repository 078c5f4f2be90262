"""A number that is not finite: no weight changes on any rank, and the place is named."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from reinforcer_tp.config import DPOConfig
from reinforcer_tp.health import HealthWatch
from tests.distributed.layouts import judge
from tests.distributed.spawn import run_distributed

SKIP = {"on_nonfinite": "skip", "max_nonfinite_steps": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return judge("four", tmp_path_factory.mktemp("model") / "hf")["folder"]


@pytest.fixture(scope="module")
def alone(model) -> SimpleNamespace:
    [found] = run_distributed(_alone, 1, model, timeout_s=300)
    return found


@pytest.fixture(scope="module")
def pairs_of_ranks(model) -> list[dict]:
    return run_distributed(_in_two_ranks, 2, model, timeout_s=300)


def _alone(model: str) -> SimpleNamespace:
    from tests.distributed import layouts
    from tests.distributed.nonfinite_ranks import micro_batches_of, open_run, state, try_step

    layouts._groups.clear()
    found = SimpleNamespace()
    nan = "nonfinite.logps:nan=0"

    # Steps 1, 2 (skipped), 3 against 1, 3.
    runs = [open_run("one", model, **SKIP) for _ in range(2)]
    found.lines = [try_step(runs[0], step, nan if step == 2 else None) for step in (1, 2, 3)]
    for step in (1, 3):
        try_step(runs[1], step)
    found.states = [state(run) for run in runs]

    # Skipped until the limit; a good step in between starts the count anew.
    run = open_run("one", model, **SKIP)
    faults = (nan, None, nan, "nonfinite.gradient:inf=3", nan)
    found.in_row = [try_step(run, step, fault) for step, fault in enumerate(faults, start=1)]
    found.counts = run.skips.to_json()

    # Step 1 is skipped: the gate looks at step 2, and at no later one.
    run = open_run("one", model, first_step_check="error", **SKIP)
    found.gate = [try_step(run, step, nan if step == 1 else None)[0] for step in (1, 2, 3)]

    found.float16 = _float16(open_run("float16", model, **SKIP), nan)
    run = open_run("one", model, **SKIP)
    next(iter(_last_norm(run)))[2].data[5] = float("nan")
    found.weight = try_step(run, 1)[0]
    found.rows = [batch.rows for batch in micro_batches_of(run, 1)]
    return found


def _last_norm(run):
    from tests.distributed.nonfinite_ranks import parameters

    return [each for each in parameters(run) if "final_layernorm" in each[1]]


def _float16(run, nan: str) -> SimpleNamespace:
    """Its loss scale begins at 65536."""
    from tests.distributed.nonfinite_ranks import state, try_step

    scale = run.training.optimizer.get_loss_scale
    found = SimpleNamespace(scales=[float(scale())])
    found.loss = try_step(run, 1, nan)
    found.scales.append(float(scale()))
    before = state(run)
    found.overflow = try_step(run, 2, "nonfinite.gradient:inf=3")
    found.changed = [name for name, value in state(run).items() if value != before[name]]
    found.scales.append(float(scale()))
    run.training.optimizer.chained_optimizers[0].grad_scaler._scale.fill_(1.0)
    found.smallest = try_step(run, 3, "nonfinite.gradient:inf=3")[0]
    return found


def _in_two_ranks(model: str) -> dict:
    from tests.distributed import layouts
    from tests.distributed.nonfinite_ranks import micro_batches_of, open_run, state, try_step

    layouts._groups.clear()
    found = {}
    for name in ("dp2", "dp2_sharded", "vpp2", "tp2"):
        run = open_run(name, model, **SKIP)
        rank = run.stage.topology.rank
        assert not try_step(run, 1)[0]
        before = state(run)
        rows = [batch.rows for batch in micro_batches_of(run, 2)]
        # On rank 1, or in the last stage of it, in the second micro-batch.
        where = f"rank=1,step=2,row={rows[1][0]}"
        texts = [
            try_step(run, 2, f"nonfinite.{fault}")[0]
            for fault in (f"gradient@{where}:nan=7", f"gradient@{where},hit=1:nan=7")
        ]
        is_same = state(run) == before
        text, metrics = try_step(run, 3)
        found[name] = SimpleNamespace(
            rank=rank, rows=rows, texts=texts, is_same=is_same, after=(text, metrics)
        )
    return found


def test_a_skipped_step_is_as_if_its_batch_were_not_there(alone):
    skipped, skipped_metrics = alone.lines[1]
    assert skipped.startswith("step 2: the loss is not finite (rank 0, micro-batch 0, log-probs of")
    assert skipped.endswith("skipped, 1 in a row (at most 2: dpo.max_nonfinite_steps), 1 in all")
    assert np.isnan(skipped_metrics["train/loss"]) and np.isnan(skipped_metrics["train/grad_norm"])
    assert skipped_metrics["train/num_pairs"] == 0
    assert [metrics["train/skipped_steps"] for _, metrics in alone.lines] == [0, 1, 1]
    assert alone.lines[2][0] == "" and alone.lines[2][1]["train/loss"] > 0
    assert alone.states[0] == alone.states[1]


def test_as_many_in_a_row_as_allowed_then_the_run_ends(alone):
    texts = [text for text, _ in alone.in_row]
    assert [bool(metrics) for _, metrics in alone.in_row] == [True, True, True, True, False]
    assert "1 in a row" in texts[0] and texts[1] == "" and "1 in a row" in texts[2]
    assert "the gradient norm is not finite" in texts[3] and "2 in a row" in texts[3]
    assert "The 2 steps before it were skipped, as many in a row as" in texts[4]
    assert "The weights of step 4 are untouched" in texts[4]
    assert alone.counts == {"in_row": 2, "total": 3}


def test_the_counts_survive_a_checkpoint():
    from reinforcer_tp.nonfinite import NonFiniteError, SkippedSteps, Trouble

    trouble, dpo = Trouble(step=9, text="the loss is not finite (here)"), DPOConfig(**SKIP)
    skips = SkippedSteps.from_json(SkippedSteps(in_row=1, total=5).to_json())
    assert "2 in a row (at most 2: dpo.max_nonfinite_steps), 6 in all" in skips.skip(trouble, dpo)
    with pytest.raises(NonFiniteError, match="step 9: the loss is not finite"):
        SkippedSteps.from_json(skips.to_json()).skip(trouble, dpo)
    with pytest.raises(NonFiniteError, match=r"dpo\.on_nonfinite=skip goes on without"):
        SkippedSteps().skip(trouble, DPOConfig())


def test_the_first_step_check_waits_for_a_step_that_is_finite(alone):
    first, second, third = alone.gate
    assert "first step: " not in first
    assert second.startswith("first step: log-ratios of ")
    assert third == ""


def test_a_weight_is_named_and_ends_the_run_though_batches_may_be_skipped(alone):
    assert "rank 0: 1 of" in alone.weight and "final_layernorm" in alone.weight
    assert "The weights of step 0 are untouched" in alone.weight
    named = set(map(int, re.findall(r"row (\d+) ", alone.weight)))
    assert named and named <= {row for rows in alone.rows for row in rows}


def test_in_float16_an_overflow_halves_the_scale_and_a_loss_is_never_ordinary(alone):
    found = alone.float16
    assert "the loss is not finite" in found.loss[0] and found.scales[:2] == [65536.0, 65536.0]
    assert "a gradient overflowed float16; the loss scale is halved" in found.overflow[0]
    assert not found.changed and found.scales[2] <= 65536.0
    assert np.isfinite(found.overflow[1]["train/loss"])
    assert found.overflow[1]["train/skipped_steps"] == 1
    assert "overflows float16 at the smallest loss scale, 1. " in found.smallest


@pytest.mark.parametrize("name", ["dp2", "dp2_sharded", "vpp2", "tp2"])
def test_a_gradient_is_named_where_it_arose(pairs_of_ranks, name):
    world = [rank[name] for rank in pairs_of_ranks]
    culprit, text = world[1], world[0].texts[0]
    assert all(rank.texts == world[0].texts and rank.is_same for rank in world)
    assert f"rank 1, micro-batch 1, source rows {list(culprit.rows[1])}: " in text
    assert "the gradient norm is not finite" in text
    assert text.count("micro-batch") == 1
    spreads = name in ("vpp2", "tp2")
    assert ("and some on rank 0" in text) == spreads


@pytest.mark.parametrize(
    ("name", "suspect"),
    [
        ("dp2", "one of the ranks 0, 1"),
        ("dp2_sharded", "rank 1"),
        ("vpp2", "rank 1"),
        ("tp2", "rank 1"),
    ],
)
def test_what_does_not_come_again_is_the_hardwares(pairs_of_ranks, name, suspect):
    text = pairs_of_ranks[0][name].texts[1]
    assert "not again when every micro-batch is computed a second time" in text
    assert f"the hardware of {suspect} is suspect" in text
    text, metrics = pairs_of_ranks[0][name].after
    assert text == "" and metrics["train/grad_norm"] > 0


def glance(rank: int, *, chunk: int = -1, num_bad: int = 0, norm: float = 1.0):
    from reinforcer_tp.mcore.gradients import Glance

    return Glance(rank=rank, chunk=chunk, num_bad=num_bad, num=9, norm=norm, first_bad="a")


def test_backward_begins_at_the_last_chunk_and_where_most_is_bad():
    from reinforcer_tp.nonfinite import _origin

    bad = [(0, 9), (0, 9), (1, 3), (1, 5)]
    glances = [glance(r, chunk=chunk, num_bad=n) for r, (chunk, n) in enumerate(bad)]
    assert _origin(glances) == [glances[3]]


def test_gradients_that_overflow_only_together_are_no_hardwares_fault():
    from reinforcer_tp.nonfinite import _no_place

    before = [(glance(rank), None) for rank in range(2)]
    small, large = 1.0, 8e18
    alone = [[(i, (i,), glance(r, norm=[small, large][r * i])) for i in (0, 1)] for r in (0, 1)]
    text = _no_place(before, alone)
    assert "overflows; the largest gradient, of norm 8.0e+18, is that of rank 1, micro-batch 1" in (
        text
    )
    alone = [[(0, (0,), glance(r))] for r in (0, 1)]
    assert "the hardware of some rank is suspect" in _no_place(before, alone)


def test_the_watch_passes_over_skipped_steps():
    bad = {"train/loss": 0.5, "train/health/saturated": 1.0, "train/num_pairs": 8}
    skipped = dict.fromkeys(bad, float("nan"))
    steps = [bad, skipped] * HealthWatch.WINDOW
    watch = HealthWatch(beta=0.1, sft_loss_weight=0.0, losses=["sigmoid"])
    hints = [watch.hints(step, metrics) for step, metrics in enumerate(steps, start=1)]
    assert [len(lines) for lines in hints].index(1) == 2 * HealthWatch.WINDOW - 2
    assert "100 % of pairs were decided" in hints[2 * HealthWatch.WINDOW - 2][0]
