"""Runs a function in several gloo processes on this machine and brings back what each returned."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_pool: list[tuple[BaseProcess, Connection]] = []  # idle ranks of the last world size


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120
) -> list[Any]:
    """`fn(*args)` in `world_size` processes with a gloo default group -> the results by rank.

    `fn` must be a module-level function; it reads its rank from torch.distributed. Arguments and
    results travel by pickle (detach tensors that need gradients). The first rank that fails ends
    all others at once and its traceback is raised as RuntimeError; TimeoutError after `timeout_s`.

    The processes stay for the next call with this world size, since they have imported the heavy
    modules: `fn` must undo what it patches. None outlives a failure, nor this process.
    """
    ranks = _ranks(world_size)
    with tempfile.TemporaryDirectory(prefix="run_distributed_") as name:
        folder = Path(name)
        (folder / "task").write_bytes(pickle.dumps((fn, args, timeout_s)))
        try:
            for _, connection in ranks:
                connection.send(name)
            _wait(ranks, folder, time.monotonic() + timeout_s)
        except BaseException:
            _end_pool()
            raise
        return [pickle.loads((folder / f"result{r}").read_bytes()) for r in range(world_size)]


def _ranks(world_size: int) -> list[tuple[BaseProcess, Connection]]:
    if len(_pool) != world_size:
        _end_pool()
        context = multiprocessing.get_context("spawn")
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, world_size), daemon=True)
            process.start()
            _pool.append((process, ours))
    return _pool


def _serve(connection: Connection, rank: int, world_size: int) -> None:
    """A rank: one task after the other, until a task fails or the parent is gone."""
    _die_with_parent()
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        GLOO_SOCKET_IFNAME="lo",
        CUDA_VISIBLE_DEVICES="",
    )
    while True:
        folder = Path(connection.recv())
        try:
            _run_task(folder, rank, world_size)
        except BaseException:
            (folder / f"error{rank}").write_text(traceback.format_exc())
            raise SystemExit(1) from None


def _run_task(folder: Path, rank: int, world_size: int) -> None:
    fn, args, timeout_s = pickle.loads((folder / "task").read_bytes())
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    result = pickle.dumps(fn(*args))
    dist.barrier()  # nobody leaves while a peer still needs it
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    building = folder / f"building{rank}"
    building.write_bytes(result)
    building.rename(folder / f"result{rank}")


def _wait(ranks: list[tuple[BaseProcess, Connection]], folder: Path, deadline: float) -> None:
    def running() -> list[int]:
        return [r for r in range(len(ranks)) if not (folder / f"result{r}").exists()]

    while running():
        if any(process.exitcode is not None for process, _ in ranks):
            break
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {running()} of {len(ranks)} did not finish in time")
        time.sleep(0.02)
    # Peers of a failed rank fail too, a little later: the oldest report is the cause.
    reports = sorted(folder.glob("error*"), key=lambda path: path.stat().st_mtime_ns)
    if reports:
        rank = reports[0].name.removeprefix("error")
        raise RuntimeError(f"rank {rank} of {len(ranks)} failed:\n{reports[0].read_text()}")
    codes = [process.exitcode for process, _ in ranks]
    if any(code is not None for code in codes):
        raise RuntimeError(f"exit codes {codes}; a rank died without a report")


@atexit.register
def _end_pool() -> None:
    while _pool:
        process, connection = _pool.pop()
        process.kill()
        process.join()
        connection.close()


def _die_with_parent() -> None:
    if os.name == "posix" and os.uname().sysname == "Linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
