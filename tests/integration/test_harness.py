"""The harness must not leave processes behind: torchrun's workers escape its process group."""

import subprocess
import sys
import time

import pytest

from tests.integration import harness


def test_a_stopped_launcher_takes_its_workers_along(tmp_path, monkeypatch):
    script = tmp_path / "reinforcer_tp" / "train.py"
    script.parent.mkdir()
    script.write_text(
        "import os, pathlib, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '300'], start_new_session=True)\n"
        "pathlib.Path(sys.argv[1]).write_text(f'{os.getpid()} {child.pid}')\n"
        "time.sleep(300)\n"
    )
    note = tmp_path / "pids"
    monkeypatch.setattr(harness, "REPOSITORY", tmp_path)
    monkeypatch.setattr(harness, "TERMINATE_GRACE_S", 1.0)
    with pytest.raises(subprocess.TimeoutExpired):
        harness.run_train([str(note)], log_dir=tmp_path / "logs" / "run", nproc=None, timeout_s=3)
    pids = [int(pid) for pid in note.read_text().split()]
    deadline = time.monotonic() + 5.0
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if is_running(pid)]


def is_running(pid: int) -> bool:
    """A killed process whose parent has not collected it is a zombie, not a running one."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_result_splits_train_and_validation_lines(tmp_path):
    result = harness.RunResult(
        command=[sys.executable],
        returncode=0,
        stdout="",
        stderr="",
        seconds=0.0,
        log_dir=tmp_path,
        metrics=[
            {"step": 0, "validation/loss": 0.7},
            {"step": 1, "train/loss": 0.6, "train/lr": 0.1},
            {"step": 1, "validation/loss": 0.5, "perf/step_s": 1.0},
        ],
    )
    assert result.train_steps() == {1: {"loss": 0.6, "lr": 0.1}}
    assert result.validations() == {0: {"loss": 0.7}, 1: {"loss": 0.5}}
