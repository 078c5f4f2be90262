"""One process of a node works, the others wait for its result in a file.

A file and not a collective: preparing data may take longer than any collective's timeout, and its
failure must reach the waiting ranks as the error it is.
"""

import contextlib
import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

POLL_S = 0.1
STALE_S = 60  # a result older than the waiting process by this much is of another run
PATIENCE_S = 60.0  # with a leader that has died and may be of the launch before this one
_PROCESS_START = time.time()


def run_token(environ: Mapping[str, str]) -> str:
    """What the ranks of one node in one run share, and no other run or node has.

    torchrun gives every attempt of every run a fresh log folder, which TORCHELASTIC_ERROR_FILE of
    all local ranks lies in; without it the job and step of Slurm and the rendezvous must do.
    """
    names = (
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
        "MASTER_ADDR",
        "MASTER_PORT",
        "SLURM_JOB_ID",
        "SLURM_STEP_ID",
        "SLURM_RESTART_COUNT",
    )
    error_file = environ.get("TORCHELASTIC_ERROR_FILE", "")
    shared = [os.path.dirname(os.path.dirname(error_file)), socket.gethostname()]
    shared += [environ.get(name, "") for name in names]
    return hashlib.sha256("\n".join(shared).encode()).hexdigest()[:24]


def lead(folder: Path, token: str, work: Callable[[], Any]) -> Any:
    """The result of `work` (JSON), which the waiting processes get too, or its error likewise."""
    path = _path(folder, token)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_old(path.parent)
    _write(path, {"state": "working", "pid": os.getpid(), "pid_space": _pid_space()})
    try:
        result = work()
    except BaseException as error:  # whatever it is, the others must not wait for it
        _write(
            path,
            {
                "state": "failed",
                "is_user_error": isinstance(error, ValueError),
                "error": str(error) or type(error).__name__,
                "type": type(error).__name__,
            },
        )
        raise
    _write(path, {"state": "done", "result": result})
    return result


def wait(folder: Path, token: str, timeout_s: float) -> Any:
    """The result of the leading process of this node.

    ValueError with the leader's message where its work failed for the user's mistake, RuntimeError
    where it failed otherwise, died, or took more than `timeout_s` seconds.
    """
    path = _path(folder, token)
    begin = time.monotonic()
    deadline, patient_until = begin + timeout_s, begin + (0 if _is_torchrun() else PATIENCE_S)
    while time.monotonic() < deadline:
        state = _read(path)
        if state.get("state") == "done":
            return state["result"]
        if state.get("state") == "failed":
            if state["is_user_error"]:
                raise ValueError(state["error"])
            raise RuntimeError(
                f"the first process of this node failed to prepare the data with "
                f"{state['type']}: {state['error']}"
            )
        is_patient = time.monotonic() < patient_until
        if state and not is_patient and _has_died(state) and _read(path) == state:
            raise RuntimeError(
                f"the first process of this node (pid {state['pid']}) ended while it prepared the "
                "data, without a word; look for the out-of-memory killer"
            )
        time.sleep(POLL_S)
    raise RuntimeError(
        f"waited {timeout_s:.0f} s for the first process of this node to prepare the data "
        f"({path}); prepare it beforehand with one process, or raise data.num_workers"
    )


def _path(folder: Path, token: str) -> Path:
    return folder / f"{token}.json"


def _read(path: Path) -> dict:
    """The state that the leader of this run has written; {} before it has."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if _is_torchrun():
        return state
    return state if state["time"] > _PROCESS_START - STALE_S else {}


def _is_torchrun() -> bool:
    """Then no other launch has this file's name."""
    return "TORCHELASTIC_ERROR_FILE" in os.environ


def _write(path: Path, state: dict) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    with open(descriptor, "w", encoding="utf-8") as stream:
        json.dump(state | {"time": time.time()}, stream)
    os.replace(name, path)


def _remove_old(folder: Path, age_s: float = 86_400) -> None:
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another node was first
            if time.time() - path.stat().st_mtime > age_s:
                path.unlink()


def _pid_space() -> str:
    """What pids mean: containers on one node may have their own."""
    link = "/proc/self/ns/pid"
    return os.readlink(link) if os.path.exists(link) else ""


def _has_died(state: dict) -> bool:
    if state["state"] != "working" or state["pid_space"] != _pid_space() or not _pid_space():
        return False
    return not os.path.exists(f"/proc/{state['pid']}")
