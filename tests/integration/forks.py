"""Starts runs of train.py as forks of one server, which saves each run its seconds of imports."""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from pathlib import Path
from typing import IO

from tests.integration.fork_server import CODES, INTEGER, MARK, QUICK_EXIT

FOLDER = Path(__file__).resolve().parent
TRAIN = FOLDER.parents[1] / "reinforcer_tp" / "train.py"
START_S = 120.0  # the first run waits for the server's imports
# No import of ours reads these.
MAY_DIFFER = {"PYTHONPATH", "PYTEST_CURRENT_TEST", "REINFORCER_TP_FAULTS", CODES, QUICK_EXIT, MARK}

_server: "Server | None" = None
_lock = threading.Lock()


class Server:
    """The process that forks; it ends with this one, however this one ends."""

    def __init__(self, environment: dict[str, str]):
        self.environment = environment
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115, as long as the server
        self.control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self.process = subprocess.Popen(
                [sys.executable, str(FOLDER / "fork_server.py"), str(other.fileno()), str(TRAIN)],
                env=environment,
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.stderr,
                start_new_session=True,
            )

    def fits(self, environment: dict[str, str]) -> bool:
        different = {name for name, _ in self.environment.items() ^ environment.items()}
        return different <= MAY_DIFFER and self.process.poll() is None

    def complaint(self) -> str:
        self.stderr.seek(0)
        return f"{' '.join(self.process.args)} starts no run:\n{self.stderr.read()}"

    def stop(self) -> None:
        """Runs that go on have their keepers."""
        self.control.close()
        self.process.wait(timeout=START_S)
        self.stderr.close()


class Fork:
    """One run: as much of `subprocess.Popen` as the harness needs; `pid` is the keeper's."""

    def __init__(
        self,
        command: list[str],
        *,
        nproc: int | None,
        env: dict[str, str],
        cwd: Path,
        stdout: IO[str],
        stderr: IO[str],
    ):
        """`command`: the script and its arguments; `nproc` processes as torchrun has them."""
        self.args = command
        self.returncode: int | None = None
        run = {
            "script": command[0],
            "arguments": command[1:],
            "environment": env | ({} if nproc is None else world(nproc)),
            "cwd": str(cwd),
            "nproc": nproc,
        }
        server = running_server(env)
        self._pipe, other = os.pipe()
        try:
            with contextlib.suppress(BrokenPipeError):  # then nobody answers, see below
                socket.send_fds(
                    server.control,
                    [json.dumps(run).encode()],
                    [stdout.fileno(), stderr.fileno(), other],
                )
        finally:
            os.close(other)
        pid = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            pid = self._read(START_S)
        if pid is None:
            os.close(self._pipe)
            server.process.kill()
            server.process.wait()
            raise RuntimeError(server.complaint())
        self.pid = pid

    def _read(self, timeout: float | None) -> int | None:
        """The next integer; None once nobody is left to write one."""
        if not select.select([self._pipe], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout)
        written = os.read(self._pipe, INTEGER.size)
        return INTEGER.unpack(written)[0] if written else None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, -SIGKILL for a keeper that was killed; or subprocess.TimeoutExpired."""
        if self.returncode is None:
            status = self._read(timeout)
            self.returncode = -signal.SIGKILL if status is None else status
            os.close(self._pipe)
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def running_server(environment: dict[str, str]) -> Server:
    """The server; a new one for another environment, which an import may have read."""
    global _server
    with _lock:
        if _server is not None and not _server.fits(environment):
            _server.stop()
            _server = None
        if _server is None:
            # A mark of its own: what kills the processes of a run must leave it alive.
            own = {MARK: str(uuid.uuid4()), "PYTHONPATH": str(FOLDER.parents[1])}
            _server = Server(environment | own)
            atexit.register(_server.stop)
        return _server


def world(nproc: int) -> dict[str, str]:
    """What torchrun tells every process of one node; fork_server.py adds the rank and the port."""
    return {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_ERROR_FILE": f"/nowhere/{uuid.uuid4()}/0/error.json",
    }
