"""Processes of the self-test: started once, each layout runs in the first few of them.

They are forks of a server that has imported torch and Megatron, so that this is paid once and new
ones start at once. None of them outlives the parent: it holds the pipe by which the server lives,
and the server's end kills its children.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforcer_tp.config import Config
from reinforcer_tp.selftest.layouts import num_cores

if TYPE_CHECKING:
    from reinforcer_tp.data.tokenized import TokenizedSet

_LATE_REPORTS_S = 0.5  # after the first failure: the cause may be told after its consequences


class RankError(RuntimeError):
    """A process raised, died or did not answer: one line; `details` is a traceback or a log."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


@dataclass(frozen=True, kw_only=True)
class Task:
    """One layout to run; the same value on all of its processes."""

    config: Config  # with the layout; models are named by their folders
    pairs: TokenizedSet  # one global batch
    gradients: str  # safetensors file of the baseline's gradients
    is_baseline: bool  # write that file


@dataclass(frozen=True, kw_only=True)
class _Order:
    task: Task
    world_size: int
    store: str  # file through which the processes find each other; no port is taken
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class _Report:
    """What a process sends back."""

    result: Any = None
    error: str | None = None  # one line
    details: str = ""
    at: float = 0.0  # time.monotonic(), which all processes share


class Ranks:
    """A pool of `count` processes; use it as a context manager."""

    def __init__(self, count: int, folder: Path, function: str) -> None:
        """`function` is `module:name`, called with a Task; `folder` takes logs and store files."""
        self._count, self._folder, self._function = count, folder, function
        self._members: list[tuple[BaseProcess, Connection]] = []
        self._num_tasks = 0

    def __enter__(self) -> Ranks:
        self._start()
        return self

    def __exit__(self, *_) -> None:
        self._end()

    def run(self, task: Task, *, world_size: int, timeout_s: float) -> list[Any]:
        """The function's result in `world_size` processes with a gloo group, by rank.

        Raises RankError when a process fails or `timeout_s` pass; all processes are then ended,
        and the next call starts new ones.
        """
        if not self._members:
            self._start()
        self._num_tasks += 1
        order = _Order(
            task=task,
            world_size=world_size,
            store=str(self._folder / f"store{self._num_tasks}"),
            timeout_s=timeout_s,
        )
        try:
            members = self._members[:world_size]
            for _, connection in members:
                with contextlib.suppress(OSError):  # it is dead, which shows below
                    connection.send(order)
            return [report.result for report in self._collect(members, timeout_s)]
        except BaseException:
            self._end()
            raise

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([self._function.partition(":")[0]])
        for rank in range(self._count):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, self._function, str(self._log(rank)))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is an end of file here
            self._members.append((process, ours))

    def _end(self) -> None:
        for process, _ in self._members:
            process.kill()
        for process, connection in self._members:
            process.join()
            connection.close()
        self._members = []

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.log"

    def _collect(
        self, members: list[tuple[BaseProcess, Connection]], timeout_s: float
    ) -> list[_Report]:
        reports: dict[int, _Report] = {}
        dead: list[int] = []
        deadline = time.monotonic() + timeout_s
        while len(reports) + len(dead) < len(members):
            waiting = {c: r for r, (_, c) in enumerate(members) if r not in (*reports, *dead)}
            ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
            for connection in ready:
                rank = waiting[connection]
                try:
                    reports[rank] = connection.recv()
                except (EOFError, OSError):
                    dead.append(rank)
            failed = dead or [r for r, report in reports.items() if report.error is not None]
            if failed:
                deadline = min(deadline, time.monotonic() + _LATE_REPORTS_S)
            if not ready:
                break
        self._check(members, reports, dead, timeout_s)
        return [reports[rank] for rank in range(len(members))]

    def _check(
        self,
        members: list[tuple[BaseProcess, Connection]],
        reports: dict[int, _Report],
        dead: list[int],
        timeout_s: float,
    ) -> None:
        """Raises RankError for the first cause. Peers of a failed process fail too, later."""
        of = f"of {len(members)}"
        if dead:
            process, _ = members[dead[0]]
            process.join(1.0)
            log = self._log(dead[0]).read_text(errors="replace")
            raise RankError(
                f"process {dead[0]} {of} died, exit code {process.exitcode}"
                + (" (out of memory?)" if process.exitcode == -signal.SIGKILL else ""),
                log[-3000:],
            )
        failures = [(r.at, rank, r) for rank, r in reports.items() if r.error is not None]
        if failures:
            _, rank, report = min(failures, key=lambda failure: failure[:2])
            raise RankError(f"process {rank} {of}: {report.error}", report.details)
        silent = [rank for rank in range(len(members)) if rank not in reports]
        if silent:
            names = ", ".join(map(str, silent))
            raise RankError(f"no answer from process {names} {of} within {timeout_s:g} s")


def _serve(connection: Connection, rank: int, name: str, log: str) -> None:
    """A process: one task after the other, until one fails or the parent is gone."""
    _die_with_server()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)  # gloo writes there itself
    os.dup2(output, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME=_loopback())
    module, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    while True:
        try:
            order = connection.recv()
        except EOFError:
            return
        try:
            connection.send(_Report(result=_run(function, order, rank)))
        except BaseException as error:
            connection.send(_failure(error))
            raise SystemExit(1) from None


def _run(function: Callable[[Task], Any], order: _Order, rank: int) -> Any:
    import torch
    import torch.distributed as dist

    from reinforcer_tp.mcore.topology import destroy_topology

    torch.set_num_threads(max(num_cores() // order.world_size, 1))
    os.environ.update(WORLD_SIZE=str(order.world_size), LOCAL_WORLD_SIZE=str(order.world_size))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{order.store}",
        rank=rank,
        world_size=order.world_size,
        timeout=timedelta(seconds=order.timeout_s + 60),  # the parent gives up first
    )
    result = function(order.task)
    dist.barrier()  # nobody leaves while a peer still needs it
    destroy_topology()
    gc.collect()  # the model is held by its own hooks
    return result


def _failure(error: BaseException) -> _Report:
    lines = str(error).strip().splitlines() or ["(no message)"]
    return _Report(
        error=f"{type(error).__name__}: {lines[0]}",
        details=traceback.format_exc(),
        at=time.monotonic(),
    )


def _loopback() -> str:
    return "lo" if sys.platform == "linux" else "lo0"


def _die_with_server() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
