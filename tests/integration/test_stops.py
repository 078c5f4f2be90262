"""Signals, the stop file, the deadline: one checkpoint, exit code 75, exit.json; then resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.harness import REPOSITORY, RunResult, run_environment, run_train
from tests.integration.oracle import OracleConfig
from tests.integration.overrides import trainer_overrides

STEPS = 5000  # never reached


@pytest.fixture
def overrides(random_llama, random_rows) -> list[str]:
    config = OracleConfig(
        model=random_llama, data=random_rows["random"], num_steps=STEPS, batch_size=4, lr=1e-4
    )
    return [
        *trainer_overrides(config),
        "dpo.max_num_epochs=100000",
        "checkpointing.enabled=true",
        "checkpointing.save_period=100000",
    ]


def ends(log_dir: Path) -> list[dict]:
    """exit.json of every attempt."""
    return [json.loads(p.read_text()) for p in sorted(log_dir.glob("attempts/*/exit.json"))]


def steps(log_dir: Path) -> int:
    """Steps that have been logged."""
    path = log_dir / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


class Signals:
    """For `kill_when`: sends signals to ranks once the run has logged `after` steps."""

    def __init__(self, log_dir: Path, number: int, after: int = 2) -> None:
        self.log_dir, self.number, self.after, self.is_sent = log_dir, number, after, False

    def __call__(self) -> bool:
        if not self.is_sent and steps(self.log_dir) >= self.after:
            self.send()
            self.is_sent = True
        return False

    def send(self) -> None:
        if self.number == 0:
            (self.log_dir / "stop").touch()
            return
        [rank_0] = pids_writing(self.log_dir / "metrics.jsonl")
        os.kill(rank_0, self.number)


def pids_writing(path: Path) -> list[int]:
    """Processes that have `path` open: rank 0."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(path):
                found.append(int(link.parts[2]))
        except OSError:
            continue
    return found


def check_stopped(result: RunResult, reason: str) -> int:
    """The step after which it stopped."""
    [end] = ends(result.log_dir)
    assert (end["code"], end["name"], end["cause"]) == (75, "REQUEUE", "stop"), end
    lines = [line for line in result.stderr.splitlines() if line.startswith("error[")]
    assert lines == [f"error[75]: {end['message']}"], result.describe()
    step, folder = end["step"], result.log_dir / "checkpoints" / f"step_{end['step']}"
    assert end["message"].startswith(f"stopped by {reason} after step {step} of {STEPS}; saved ")
    assert str(folder) in end["message"] and (folder / "manifest.json").is_file()
    assert end["start_step"] == 0 and end["saved_step"] == step
    heartbeat = json.loads((result.log_dir / "heartbeat").read_text())
    assert heartbeat["step"] == step and heartbeat["attempt"] == 1
    assert "Traceback" not in result.stderr
    return step


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1"), (0, "the stop file")],
)
def test_one_rank_is_asked_and_both_stop_after_a_save(number, reason, overrides, tmp_path):
    log_dir = tmp_path / "run"
    result = run_train(
        overrides, log_dir=log_dir, nproc=2, fork=True, kill_when=Signals(log_dir, number)
    )
    step = check_stopped(result, reason)
    assert step < STEPS and not (log_dir / "stop").exists()
    again = run_train(
        [*overrides, f"dpo.max_num_steps={step + 1}"], log_dir=log_dir, nproc=2, fork=True
    )
    assert again.returncode == 0, again.describe()
    assert sorted(again.train_steps()) == list(range(1, step + 2))
    assert [end["code"] for end in ends(log_dir)] == [75, 0]
    assert ends(log_dir)[1]["start_step"] == step


def test_the_deadline_leaves_time_to_save(overrides, tmp_path):
    result = run_train(
        [*overrides, "checkpointing.checkpoint_must_save_by=00:00:00:08"],
        log_dir=tmp_path / "run",
        nproc=None,
        fork=True,
    )
    assert result.returncode == 75, result.describe()
    assert check_stopped(result, "checkpointing.checkpoint_must_save_by") > 1
    [end] = ends(result.log_dir)
    assert 4 < end["ended"] - end["started"] < 8


def test_a_second_signal_leaves_at_once(overrides, tmp_path):
    """The step never ends; torchrun's copy of the first signal is not the second one."""
    log_dir, sent = tmp_path / "run", []

    def send() -> bool:
        now = time.monotonic()
        if steps(log_dir) >= 1 and (not sent or (len(sent) < 4 and now - sent[-1] > 0.9)):
            os.kill(pids_writing(log_dir / "metrics.jsonl")[0], signal.SIGINT)
            sent.append(now)
        return False

    result = run_train(
        overrides,
        log_dir=log_dir,
        nproc=None,
        fork=True,
        kill_when=send,
        env={"REINFORCER_TP_FAULTS": "step.begin@step=2:sleep=60"},
    )
    assert result.returncode == 75, result.describe()
    assert time.monotonic() - sent[0] >= 2 and len(sent) >= 3
    [end] = ends(log_dir)
    assert end["cause"] == "stop" and "stopped by SIGINT at once, last step 1" in end["message"]


def start(arguments: list[str], tmp_path: Path, log_dir: Path) -> subprocess.Popen:
    command = [sys.executable, str(REPOSITORY / "reinforcer_tp" / "train.py"), *arguments]
    return subprocess.Popen(
        [*command, f"logger.log_dir={log_dir}", f"reference.store_dir={tmp_path / 'store'}"],
        env=run_environment(None),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_imports_ends_it_at_once(number, overrides, tmp_path):
    """The folder of the attempt is made before torch is imported."""
    process = start(overrides, tmp_path, tmp_path / "run")
    while not list(tmp_path.glob("run/attempts/*/attempt.json")):
        time.sleep(0.005)
    began = time.monotonic()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 75 and time.monotonic() - began < 2, stderr
    [end] = ends(tmp_path / "run")
    assert (end["code"], end["phase"], end["step"]) == (75, "start", None)
    assert stderr.splitlines() == [f"error[75]: {end['message']}"]


def test_stacks_are_dumped_and_the_run_goes_on(overrides, tmp_path):
    log_dir = tmp_path / "run"
    result = run_train(
        [*overrides, "dpo.max_num_steps=60"],
        log_dir=log_dir,
        nproc=None,
        fork=True,
        kill_when=Signals(log_dir, signal.SIGUSR2),
    )
    assert result.returncode == 0 and len(result.train_steps()) == 60, result.describe()
    stacks = (log_dir / "attempts" / "0001" / "stacks_rank0.txt").read_text()
    for text in (stacks, result.stderr):
        assert "train_step" in text or "in train" in text, text


def test_the_third_failure_at_a_step_says_that_starting_again_does_not_help(overrides, tmp_path):
    log_dir, codes = tmp_path / "run", []
    for fault in ("", *4 * ["step.compute@step=3:raise=EPIPE"]):
        result = run_train(
            [*overrides, f"dpo.max_num_steps={4 if fault else 2}"],
            log_dir=log_dir,
            nproc=None,
            fork=True,
            env={"REINFORCER_TP_FAULTS": fault},
        )
        codes.append(result.returncode)
    assert codes == [0, 70, 70, 93, 93], result.describe()
    assert [end["step"] for end in ends(log_dir)] == [2, 2, 2, 2, 2]
    end = ends(log_dir)[3]
    assert "the third failure in a row without progress" in end["message"]
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error[93]: ")]
    path = log_dir / "attempts" / "0005" / "traceback_rank0.txt"
    assert f"(rank 0, last step 2, last phase compute; traceback: {path})" in line
    assert "BrokenPipeError" in path.read_text() and "Traceback" not in result.stderr


def test_a_foreign_folder_is_left_alone_and_all_ranks_end(overrides, tmp_path):
    """Refused before there is an attempt: one line, though each rank finds it by itself."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    result = run_train(overrides, log_dir=tmp_path / "run", nproc=2, fork=True)
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert line.startswith("error[78]: logger.log_dir="), result.describe()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]
