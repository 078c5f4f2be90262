"""One launch at a time in a run's folder: two would write over each other's files."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path

WAIT_S = 60.0  # the processes of a launch that was killed may still be ending
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class RunInUseError(RuntimeError):
    """Another launch is at work in this folder."""


def hold_run(log_dir: Path, wait_s: float = WAIT_S) -> None:
    """Locks `<log_dir>/attempts/lock` until this process ends, however it ends.

    Waits up to `wait_s` seconds for another holder. Raises RunInUseError. Where the file system has
    no locks, or the folder cannot be written, nothing is held. One process of a launch calls it.
    """
    path = log_dir / "attempts" / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Never closed: that would give up the lock. A forked child does not inherit it.
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return
    deadline, is_told = time.monotonic() + wait_s, False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return
        if time.monotonic() >= deadline:
            raise RunInUseError(
                f"logger.log_dir={log_dir} is in use by {_holder(file)}; wait until it ends, or "
                "choose another logger.log_dir"
            )
        if not is_told:
            is_told = True
            text = f"{log_dir} is in use by {_holder(file)}; waiting up to {wait_s:.0f} s"
            print(text, file=sys.stderr, flush=True)
        time.sleep(0.2)
    content = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
        os.pwrite(file, content, 0)


def _holder(file: int) -> str:
    try:
        holder = json.loads(os.pread(file, 4096, 0))
        return f"process {int(holder['pid'])} on {str(holder['host'])[:80]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
