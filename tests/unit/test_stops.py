"""The deadline, the stop file and the handlers of signals, without a run."""

import os
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest

from reinforcer_tp.lifecycle import stops as stops_module
from reinforcer_tp.lifecycle.stops import Reason, Stopped, Stops, deaf_children

ALONE = SimpleNamespace(world_size=1)


@pytest.fixture
def stops(tmp_path):
    with Stops() as made:
        yield made


def test_the_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with Stops():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    after = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    assert after == before


def test_a_first_signal_in_the_loop_is_a_request(stops):
    stops.begin_loop(0)
    assert stops.agree(ALONE) is None
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)  # a launcher's copy of it
    deadline = time.monotonic() + 5
    while (reason := stops.agree(ALONE)) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reason in (Reason.SIGUSR1, Reason.SIGTERM)


def test_only_the_same_signal_again_leaves_at_once(stops, monkeypatch):
    """Near its time limit a job gets USR1; a preemption's TERM after it must not end the save."""
    left, now = [], time.monotonic()
    monkeypatch.setattr(stops.ending, "leave_now", left.append)
    monkeypatch.setattr("reinforcer_tp.lifecycle.stops.time.monotonic", lambda: now)
    stops.begin_loop(0)
    for wait_s, reason in ((0, Reason.SIGUSR1), (6, Reason.SIGTERM), (1, Reason.SIGTERM)):
        now += wait_s
        stops._on_signal(reason)
    assert stops.agree(ALONE) is Reason.SIGUSR1 and not left
    now += 2
    stops._on_signal(Reason.SIGTERM)
    assert len(left) == 1 and "stopped by SIGTERM" in left[0]


def test_a_child_has_signals_of_its_own(stops):
    """Where a pool ends its workers, the trainer must not take it for its own end."""
    stops.begin_loop(0)
    pid = os.fork()
    if pid == 0:
        time.sleep(30)
        os._exit(0)
    time.sleep(0.2)
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    assert stops.agree(ALONE) is None


def test_a_child_that_is_a_program_of_its_own_lives_on(stops):
    """Slurm sends a signal to every process of a step, also to what a tracker has started."""
    with deaf_children():
        child = subprocess.Popen(["sleep", "30"])
    heard = subprocess.Popen(["sleep", "30"])
    try:
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            child.send_signal(number)
        heard.send_signal(signal.SIGUSR1)
        assert heard.wait(5) == -signal.SIGUSR1
        time.sleep(0.2)
        assert child.poll() is None
        stops.begin_loop(0)
        os.kill(os.getpid(), signal.SIGUSR1)  # this process hears as before
        deadline = time.monotonic() + 5
        while (reason := stops.agree(ALONE)) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert reason is Reason.SIGUSR1
    finally:
        child.kill()
        heard.kill()


def test_a_long_phase_rewrites_the_heartbeat(stops, tmp_path, monkeypatch):
    stops.open_run(tmp_path, None)
    stops.phase("validation")
    before = (tmp_path / "heartbeat").read_text()
    stops.tick()
    assert (tmp_path / "heartbeat").read_text() == before, "not at each micro-batch"
    monkeypatch.setattr(stops_module, "_BEAT_S", 0.0)
    stops.tick()
    assert (tmp_path / "heartbeat").read_text() != before


def test_the_stop_file_counts_once(stops, tmp_path):
    stops.open_run(tmp_path, None)
    stops.begin_loop(0)
    assert stops.agree(ALONE) is None
    (tmp_path / "stop").touch()
    assert stops.agree(ALONE) is Reason.STOP_FILE
    assert stops.agree(ALONE) is None and not (tmp_path / "stop").exists()


@pytest.mark.parametrize(
    ("step_s", "save_s", "late_at"),
    [([5.0, 20.0, 5.0], None, 1000 - 20 - 1.5 * 60), ([5.0, 5.0], 40.0, 1000 - 5 - 1.5 * 40)],
)
def test_the_deadline_leaves_time_for_a_step_and_a_save(
    step_s, save_s, late_at, stops, tmp_path, monkeypatch
):
    now = time.monotonic()
    monkeypatch.setattr("reinforcer_tp.lifecycle.stops.time.monotonic", lambda: now)
    begin = now
    stops.open_run(tmp_path, 1000.0)
    stops._begin = begin
    stops.begin_loop(0)
    for step, seconds in enumerate(step_s, start=1):
        now += seconds
        stops.step(step)
    if save_s is not None:
        stops.saved(2, save_s)
    now = begin + late_at - 1
    assert stops.agree(ALONE) is None
    now = begin + late_at + 1
    assert stops.agree(ALONE) is Reason.DEADLINE


def test_what_a_stop_says(tmp_path):
    saved = Stopped(Reason.SIGTERM, step=3, total_steps=9, saved=tmp_path)
    assert str(saved) == (
        f"stopped by SIGTERM after step 3 of 9; saved {tmp_path}; the same command goes on"
    )
    unsaved = Stopped(Reason.STOP_FILE, step=3, total_steps=9, saved=None)
    assert str(unsaved) == "stopped by the stop file after step 3 of 9; no checkpoint was saved"
