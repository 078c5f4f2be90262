"""Runs a function in several gloo processes on this machine and brings back what each returned."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120
) -> list[Any]:
    """`fn(*args)` in `world_size` processes with a gloo default group -> the results by rank.

    `fn` must be a module-level function; it reads its rank from torch.distributed. Arguments and
    results travel by pickle (detach tensors that need gradients). The first rank that fails ends
    all others at once and its traceback is raised as RuntimeError; TimeoutError after `timeout_s`.
    No process outlives the call, nor this process.
    """
    with tempfile.TemporaryDirectory(prefix="run_distributed_") as name:
        folder = Path(name)
        (folder / "task").write_bytes(pickle.dumps((fn, args, timeout_s)))
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_worker, args=(name, rank, world_size), daemon=True)
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, folder, time.monotonic() + timeout_s)
        finally:
            _end(processes)
        return [pickle.loads((folder / f"result{r}").read_bytes()) for r in range(world_size)]


def _worker(name: str, rank: int, world_size: int) -> None:
    _die_with_parent()
    folder = Path(name)
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        GLOO_SOCKET_IFNAME="lo",
        CUDA_VISIBLE_DEVICES="",
    )
    try:
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
        (folder / f"result{rank}").write_bytes(result)
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None


def _wait(processes: list[BaseProcess], folder: Path, deadline: float) -> None:
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode for process in processes):
            break
        if time.monotonic() > deadline:
            late = [rank for rank, process in enumerate(processes) if process.exitcode is None]
            raise TimeoutError(f"ranks {late} of {len(processes)} did not finish in time")
        time.sleep(0.02)
    # Peers of a failed rank fail too, a little later: the oldest report is the cause.
    reports = sorted(folder.glob("error*"), key=lambda path: path.stat().st_mtime_ns)
    if reports:
        rank = reports[0].name.removeprefix("error")
        raise RuntimeError(f"rank {rank} of {len(processes)} failed:\n{reports[0].read_text()}")
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RuntimeError(f"exit codes {codes}; a rank died without a report")


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.pid is not None:
            process.kill()
            process.join()


def _die_with_parent() -> None:
    if os.name == "posix" and os.uname().sysname == "Linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
