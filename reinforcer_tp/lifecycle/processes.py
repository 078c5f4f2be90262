"""What /proc says of this process, its children and its peers (Linux)."""

import contextlib
import os
import signal
import socket
from pathlib import Path


def _stat(pid: int) -> list[str]:
    """Fields from the state on, [] when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def process_start(pid: int) -> int:
    """Start in clock ticks since boot, which tells a process from a later one of its number."""
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def process_state(pid: int, start: int) -> str:
    """R, S, D, T (stopped), t ... of the process that began at `start`; "" when it is gone."""
    fields = _stat(pid)
    if not fields or int(fields[19]) != start or fields[0] in "ZX":
        return ""
    return fields[0]


def machine() -> str:
    """Processes with the same one can see each other's numbers."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def kill_children() -> None:
    """SIGKILL to all children of this process: no orphan when it leaves without tidying up."""
    own = str(os.getpid())
    for path in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(path.name))
        if fields and fields[1] == own:
            with contextlib.suppress(OSError):
                os.kill(int(path.name), signal.SIGKILL)
