"""The harness must not leave processes behind: torchrun's workers escape its process group.

And a run that it forks must be what a started one is.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.integration import forks, harness

STUBBORN = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "300"], start_new_session=True)
other = os.fork()
if other == 0:
    os.setsid()
else:
    note = pathlib.Path(sys.argv[1], "pids" + os.environ.get("RANK", ""))
    note.with_suffix(".new").write_text(f"{os.getpid()} {child.pid} {other}")
    note.with_suffix(".new").rename(note)
time.sleep(300)
"""
SLOW_TO_BEGIN = """
import os, sys, time
from tests.integration import fork_server

def slow_fork(fork=os.fork):
    pid = fork()
    if pid == 0:
        time.sleep(1.0)  # as on a busy machine
    return pid

os.fork = slow_fork
nothing = os.open(os.devnull, os.O_RDWR)
run = {"environment": {fork_server.MARK: os.environ[fork_server.MARK]}, "nproc": None}
fork_server.keep(run, nothing, nothing, int(sys.argv[1]))
time.sleep(60.0)
"""
WITNESS = """
import atexit, json, os, sys
found = {
    "argv": sys.argv[1:],
    "name": __name__,
    "file": __file__,
    "first": sys.path[:3],
    "cwd": os.getcwd(),
    "environment": dict(os.environ),
    "stdin": sys.stdin.read(),
    "session": os.getsid(0),
}
atexit.register(print, "the end")
print(json.dumps(found))
"""


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    """What run_train starts in place of the trainer."""
    monkeypatch.setattr(harness, "REPOSITORY", tmp_path)
    monkeypatch.setattr(harness, "TERMINATE_GRACE_S", 1.0)
    path = tmp_path / "reinforcer_tp" / "train.py"
    path.parent.mkdir()
    return path


def run(tmp_path: Path, **how) -> harness.RunResult:
    return harness.run_train([str(tmp_path)], log_dir=tmp_path / "logs" / "run", **how)


@pytest.mark.parametrize(
    ("fork", "nproc"), [(False, None), (True, None), (True, 2)], ids=["real", "fork", "two-forks"]
)
def test_a_stopped_launcher_takes_its_workers_along(fork, nproc, script, tmp_path):
    script.write_text(STUBBORN)
    with pytest.raises(subprocess.TimeoutExpired):
        run(tmp_path, nproc=nproc, fork=fork, timeout_s=1.5 if fork else 3)
    pids = [int(pid) for note in tmp_path.glob("pids*") for pid in note.read_text().split()]
    assert len(pids) == 3 * (nproc or 1)
    wait_until_ended(pids)


def test_a_forked_process_is_killed_as_a_started_one(script, tmp_path):
    script.write_text(STUBBORN)
    for fork in (True, False):
        started = tmp_path / "pids"
        result = run(tmp_path, nproc=None, fork=fork, kill_when=started.exists, timeout_s=60)
        assert result.returncode == -signal.SIGKILL
        pids = [int(pid) for pid in started.read_text().split()]
        wait_until_ended(pids)
        started.unlink()


def test_a_fork_finds_what_a_started_script_finds(script, tmp_path):
    script.write_text(WITNESS)
    env = {"PYTHONPATH": str(tmp_path / "modules")}
    found = []
    for fork in (False, True):
        result = run(tmp_path, nproc=None, fork=fork, env=env)
        assert (result.returncode, result.stderr) == (0, ""), result.describe()
        line, end = result.stdout.splitlines()
        assert end == "the end"
        found.append(json.loads(line))
        session = found[-1].pop("session")
        assert session != os.getsid(0)
        found[-1]["environment"].pop(harness.MARK)
    assert session != os.getsid(forks._server.process.pid)  # the last one is the fork
    started, forked = found
    assert forked == started


@pytest.mark.parametrize(
    ("ends", "status", "says"),
    [
        ("sys.exit(65)", 65, ""),
        ("raise ValueError('made up')", 1, "ValueError: made up"),
        ("sys.exit('in words')", 1, "in words"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("os._exit(3)", 3, ""),
    ],
    ids=["status", "exception", "words", "killed", "at-once"],
)
def test_a_fork_ends_as_a_started_script_does(ends, status, says, script, tmp_path):
    script.write_text(f"import os, signal, sys\n{ends}\n")
    for fork in (False, True):
        result = run(tmp_path, nproc=None, fork=fork)
        assert result.returncode == status, result.describe()
        assert result.stderr.splitlines()[-1:] == ([says] if says else []), result.describe()


def test_a_forked_process_that_fails_ends_the_others(script, tmp_path):
    script.write_text(
        "import os, sys, time\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')\n"
        "sys.stdout.write(' '.join(os.environ[name] for name in names) + '\\n')\n"
        "sys.stdout.flush()\n"
        "time.sleep(1)\n"
        "sys.exit(65) if os.environ['RANK'] == '1' else time.sleep(300)\n"
    )
    result = run(tmp_path, nproc=2, fork=True, timeout_s=60)
    assert result.returncode == 1, result.describe()
    assert sorted(result.stdout.splitlines()) == ["0 0 2", "1 1 2"]


def test_a_fork_that_is_slow_to_begin_hears_sigterm():
    """On a loaded machine one swallowed it, and waited for a rank that had been killed."""
    receiver, sender = os.pipe()
    command = [sys.executable, "-c", SLOW_TO_BEGIN, str(sender)]
    mark = str(uuid.uuid4())
    environment = os.environ | {forks.MARK: mark}
    with subprocess.Popen(
        command, pass_fds=[sender], env=environment, cwd=harness.REPOSITORY
    ) as keeper:
        try:
            os.close(sender)
            assert forks.INTEGER.unpack(os.read(receiver, 4)) == (keeper.pid,)
            keeper.send_signal(signal.SIGTERM)
            assert keeper.wait(30) == 0
            assert forks.INTEGER.unpack(os.read(receiver, 4)) == (-signal.SIGTERM,)
        finally:
            harness.kill_marked(f"{forks.MARK}={mark}")
            os.close(receiver)


def test_forks_know_each_other(script, tmp_path):
    script.write_text(
        "import sys, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "sums = torch.tensor([dist.get_rank() + 1])\n"
        "dist.all_reduce(sums)\n"
        "sys.stdout.write(f'sum {sums.item()}\\n')\n"
        "dist.destroy_process_group()\n"
    )
    result = run(tmp_path, nproc=2, fork=True, timeout_s=60)
    assert result.returncode == 0, result.describe()
    assert result.stdout.splitlines() == ["sum 3"] * 2


def test_another_environment_is_another_server(monkeypatch):
    """Libraries read some of it when they are imported, which the server has done long ago."""

    class Idle(forks.Server):
        def __init__(self, environment):
            self.environment, self.is_stopped = environment, False
            self.process = SimpleNamespace(poll=lambda: None)

        def stop(self):
            self.is_stopped = True

    monkeypatch.setattr(forks, "Server", Idle)
    monkeypatch.setattr(forks, "_server", None)
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": "/a", harness.MARK: "1"}
    first = forks.running_server(environment)
    assert first.environment[harness.MARK] != "1"
    again = forks.running_server(environment | {"PYTHONPATH": "/b", harness.MARK: "2"})
    assert again is first and not first.is_stopped
    for other in ({"TRITON_INTERPRET": "0"}, {"TRITON_INTERPRET": "0", "NEW": ""}, {}):
        before = forks._server
        assert forks.running_server(other) is not before and before.is_stopped
    forks._server.process.poll = lambda: -9
    assert not forks._server.fits({})


def test_nothing_of_the_server_outlives_its_parent():
    """Not even after SIGKILL, when no `finally` and no atexit runs."""
    code = (
        "import os, signal\n"
        "from tests.integration import forks, harness\n"
        "forks.TRAIN = '/dev/null'\n"  # fewer imports to wait for
        "environment = harness.run_environment(None) | {harness.MARK: 36 * 'x'}\n"
        "print(forks.running_server(environment).process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=harness.REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    wait_until_ended([int(done.stdout)], timeout_s=forks.START_S)


def wait_until_ended(pids: list[int], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
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
