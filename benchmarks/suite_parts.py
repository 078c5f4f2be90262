"""A part of a suite: a Python program with a time limit, whose end leaves nothing running."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import IO

ROOT = Path(__file__).parents[1]
# In the environment of all that a part starts: its mark, after that of the part which it is in.
MARK = "REINFORCER_TP_SUITE_PART"
TAIL_LINES = 30


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    arguments: list[str]  # of python
    limit_s: float
    # stdout -> what it measured, asked also of a part that failed or was stopped; a list `wrong`
    # in it that is not empty is a failure
    read: Callable[[str], dict] = lambda stdout: {}
    needs: Path | None = None  # an earlier part leaves it; without it this one is not run


@dataclass(kw_only=True)
class Outcome:
    verdict: str  # passed | FAILED: why | not run: why
    seconds: float = 0.0
    limit_s: float = 0.0  # it ran under
    found: dict = field(default_factory=dict)
    tail: list[str] = field(default_factory=list)  # last lines of output; empty where it passed

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


def stop_with_parts() -> None:
    """What runs must not outlive a suite that is stopped."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, lambda *_: sys.exit(1))


def run_part(part: Part, limit_s: float) -> Outcome:
    """Runs it, its output on ours as it comes. At the limit all that it started is killed."""
    if part.needs is not None and not part.needs.exists():
        missing = f"{part.needs.parent.name}/{part.needs.name}"
        return Outcome(verdict=f"not run: no earlier part has left {missing}")
    print(
        f"\n=== {part.name}, at most {limit_s:.0f} s: python {' '.join(part.arguments)}", flush=True
    )
    start, process, echoes = time.monotonic(), None, []
    stdout, tail = [], deque(maxlen=TAIL_LINES)
    mark = f"{os.getpid()}-{uuid.uuid4()}"
    try:  # a signal may end us at any line from here on
        process = _start(part.arguments, mark)
        for source, to, keep in (
            (process.stdout, sys.stdout, (stdout, tail)),
            (process.stderr, sys.stderr, (tail,)),
        ):
            echoes.append(Thread(target=_echo, args=(source, to, keep), daemon=True))
            echoes[-1].start()
        code = process.wait(limit_s)
        verdict = "passed" if code == 0 else f"FAILED: exit code {code}"
    except subprocess.TimeoutExpired:
        verdict = f"FAILED: not done after {limit_s:g} s"
    finally:
        kill_all(process, mark)
    for echo in echoes:
        echo.join(5)
    outcome = Outcome(verdict=verdict, seconds=time.monotonic() - start, limit_s=limit_s)
    return _with_findings(outcome, part, "".join(stdout), list(tail))


def _start(arguments: list[str], mark: str) -> subprocess.Popen:
    # Under the interpreter nothing here would be about the GPU.
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    marks = f"{os.environ.get(MARK, '')} {mark}"
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=inherited | {MARK: marks, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def _with_findings(outcome: Outcome, part: Part, stdout: str, tail: list[str]) -> Outcome:
    try:
        outcome.found = part.read(stdout)
    except Exception as error:  # another program's output; the suite goes on whatever it holds
        if outcome.passed:
            why = f"{type(error).__name__}: {error}"
            outcome.verdict = f"FAILED: its result cannot be read ({why})"
    if wrong := "; ".join(outcome.found.get("wrong", [])):
        outcome.verdict = f"FAILED: {wrong}" if outcome.passed else f"{outcome.verdict}: {wrong}"
    if not outcome.passed:
        outcome.tail = tail
    return outcome


def _echo(source: IO[str], terminal: IO[str], keep: tuple) -> None:
    for line in source:
        terminal.write(line)
        terminal.flush()
        for lines in keep:
            lines.append(line)


def kill_all(process: subprocess.Popen | None, mark: str) -> None:
    """Kills the group of a part, and what left it for a session of its own (torchrun's workers)."""
    if process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for _ in range(20):  # what is being forked meanwhile is found the next time
        marked = marked_processes(mark)
        if not marked:
            return
        for pid in marked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def marked_processes(mark: str) -> list[int]:
    """Ids of living processes with this mark, where /proc tells."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or gone
            for line in environ.read_bytes().split(b"\0"):
                name, _, marks = line.partition(b"=")
                if name == MARK.encode() and mark.encode() in marks.split():
                    found.append(int(environ.parent.name))
    return found
