"""Runs the real `reinforcer_tp/train.py`, alone or under torchrun, and reads what it left."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.fork_server import MARK
from tests.integration.forks import Fork

REPOSITORY = Path(__file__).resolve().parents[2]
TERMINATE_GRACE_S = 10.0  # torchrun ends its workers itself when asked kindly


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What one run of train.py returned and wrote."""

    command: list[str]
    returncode: int
    stdout: str
    stderr: str
    seconds: float
    log_dir: Path
    metrics: list[dict]  # lines of <log_dir>/metrics.jsonl, in order

    def train_steps(self) -> dict[int, dict[str, float]]:
        """step -> training metrics without their `train/` prefix."""
        return self._part("train/")

    def validations(self) -> dict[int, dict[str, float]]:
        """step -> validation metrics without their `validation/` prefix."""
        return self._part("validation/")

    def _part(self, prefix: str) -> dict[int, dict[str, float]]:
        steps: dict[int, dict[str, float]] = {}
        for line in self.metrics:
            part = {
                name.removeprefix(prefix): value
                for name, value in line.items()
                if name.startswith(prefix)
            }
            if part:
                steps.setdefault(line["step"], {}).update(part)
        return steps

    def describe(self) -> str:
        """For assertion messages: the command and the ends of both outputs."""
        return (
            f"{' '.join(self.command)}\nexit {self.returncode} after {self.seconds:.1f} s\n"
            f"--- stdout\n{self.stdout[-3000:]}\n--- stderr\n{self.stderr[-5000:]}"
        )


def run_train(
    overrides: Sequence[str],
    *,
    log_dir: Path,
    nproc: int | None = 1,
    config: Path | str | None = None,
    flags: Sequence[str] = (),
    timeout_s: float = 240.0,
    env: dict[str, str] | None = None,
    kill_when: Callable[[], bool] | None = None,
    fork: bool = False,
) -> RunResult:
    """Run train.py with `key=value` overrides; `nproc=None` starts it without torchrun.

    `fork` starts it, `nproc` times, in processes that have imported its modules: for tests of what
    it says and does, not of how it is launched. There is no torchrun, nothing is imported anew, and
    all ranks hash strings alike, so that a set has one order; see forks.py.
    `kill_when` is asked all the time; once it says so, every process dies at once (SIGKILL).
    Without an override of `reference.*` the run has a store of its own, beside `log_dir`: what
    another test swept must not stand in for what this one would compute.
    Output goes to files beside `log_dir`, so that an orphan holding a pipe cannot block the test.
    Nothing that this run started is alive when it returns.
    """
    command = [str(REPOSITORY / "reinforcer_tp" / "train.py")]
    if config is not None:
        command += ["--config", str(config)]
    if not any(override.startswith("reference.") for override in overrides):
        overrides = [*overrides, f"reference.store_dir={log_dir}.store"]
    command += [*flags, *overrides, f"logger.log_dir={log_dir}"]
    log_dir.parent.mkdir(parents=True, exist_ok=True)
    outputs = [log_dir.parent / f"{log_dir.name}.{stream}" for stream in ("stdout", "stderr")]
    mark = f"{MARK}={uuid.uuid4()}"
    name, value = mark.split("=")
    started = time.monotonic()
    with open(outputs[0], "w") as stdout, open(outputs[1], "w") as stderr:
        process = start(
            command,
            nproc,
            fork=fork,
            stdout=stdout,
            stderr=stderr,
            cwd=REPOSITORY,
            env=run_environment(env) | {name: value},
        )
        try:
            wait_for(process, mark, timeout_s, kill_when)
        finally:
            stop_everything(process, mark)
    return RunResult(
        command=process.args,
        returncode=process.returncode,
        stdout=outputs[0].read_text(),
        stderr=outputs[1].read_text(),
        seconds=time.monotonic() - started,
        log_dir=log_dir,
        metrics=read_metrics(log_dir),
    )


def start(
    command: list[str], nproc: int | None, *, fork: bool, **how: Any
) -> subprocess.Popen | Fork:
    if fork:
        return Fork(command, nproc=nproc, **how)
    return subprocess.Popen(
        [*launcher(nproc), *command], stdin=subprocess.DEVNULL, start_new_session=True, **how
    )


def launcher(nproc: int | None) -> list[str]:
    if nproc is None:
        return [sys.executable]
    return [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}"),
        *("--master-addr=127.0.0.1", f"--master-port={free_port()}"),
    ]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_environment(extra: dict[str, str] | None) -> dict[str, str]:
    """This process's environment without what a launcher around the tests may have set."""
    launched_by = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_",
        "TORCHELASTIC",
    )
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(launched_by)}
    extra = dict(extra or {})
    paths = [str(REPOSITORY), extra.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]
    fixed = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # gloo on CPU, also on a machine with one GPU
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    return inherited | fixed | extra


def wait_for(
    process: subprocess.Popen | Fork,
    mark: str,
    timeout_s: float,
    kill_when: Callable[[], bool] | None,
) -> None:
    """Until the process ends; raises subprocess.TimeoutExpired."""
    if kill_when is None:
        process.wait(timeout=timeout_s)
        return
    deadline = time.monotonic() + timeout_s
    while process.poll() is None:
        if kill_when():
            kill_marked(mark)
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(process.args, timeout_s)
        time.sleep(0.01)


def stop_everything(process: subprocess.Popen | Fork, mark: str) -> None:
    """End the process and whatever it started.

    Neither its process group nor its children are enough: torchrun's workers lead sessions of
    their own and lose their parent when it dies. All of them inherit the mark in their environment.
    """
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=TERMINATE_GRACE_S)
    kill_marked(mark)
    process.wait()


def kill_marked(mark: str) -> None:
    for pid in marked_processes(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def marked_processes(mark: str) -> list[int]:
    """Living processes that were started with `mark` in their environment (Linux)."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in environment.read_bytes():
                found.append(int(environment.parent.name))
    return found


def read_metrics(log_dir: Path) -> list[dict]:
    path = log_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
