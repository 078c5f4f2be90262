"""What is left of each attempt of a run, since torchrun hides exit codes. Light: no torch.

<log_dir>/attempts/0001/attempt.json      who began it, when, and in which Slurm job
                        exit.json         how it ended; the first rank that knows writes it
                        traceback_rankR.txt, stacks_rankR.txt
<log_dir>/heartbeat                       rewritten after each step, and within long phases
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reinforcer_tp.lifecycle.exits import Exit
from reinforcer_tp.lifecycle.position import Position
from reinforcer_tp.lifecycle.processes import process_start
from reinforcer_tp.whole_files import building_name

NAMES = ("attempts", "heartbeat", "stop", "slurm")  # in log_dir, before there is a run in it
IN_A_ROW = 3  # failures without progress
_FRESH_S = 600.0  # an attempt begun before this process by more is another one
_ENDED_S = 10.0  # likewise one that ended before it
_NO_PROGRESS = {Exit.INTERNAL, Exit.IO, Exit.NO_RESTART}


def launch_token(environ: Mapping[str, str]) -> tuple[str, bool]:
    """What the ranks of one launch share, and whether no other launch has it."""
    names = (
        *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT"),
        *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
    )
    parts = [environ.get(name, "") for name in names]
    is_one_node = environ.get("WORLD_SIZE") == environ.get("LOCAL_WORLD_SIZE")
    if is_one_node:
        owner = os.getppid() if "RANK" in environ else os.getpid()
        parts += [socket.gethostname(), str(owner), str(process_start(owner))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24], is_one_node


class Attempt:
    """This attempt's folder. Nothing here raises OSError: a run must not fail for its records."""

    def __init__(self, log_dir: Path, rank: int, world_size: int) -> None:
        self.log_dir, self._rank, self._world_size = log_dir, rank, world_size
        self._started = time.time()
        self._token, self._is_unique = launch_token(os.environ)
        self._folder: Path | None = None

    def folder(self) -> Path | None:
        """Claims the next number for all ranks of this launch, if no rank has; None: no disk."""
        if self._folder is None:
            with contextlib.suppress(OSError):
                self._folder = self._claim()
        return self._folder

    def _claim(self) -> Path:
        parent = self.log_dir / "attempts"
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            numbers = _numbers(parent)
            if numbers and self._is_ours(parent / f"{numbers[-1]:04d}"):
                return parent / f"{numbers[-1]:04d}"
            path = parent / f"{numbers[-1] + 1 if numbers else 1:04d}"
            building = building_name(parent)
            building.mkdir()
            about = {"token": self._token, "started": self._started, "rank": self._rank}
            if "SLURM_JOB_ID" in os.environ:
                restart = os.environ.get("SLURM_RESTART_COUNT", "0")
                about["slurm_job"] = f"{os.environ['SLURM_JOB_ID']}.{restart}"
            (building / "attempt.json").write_text(json.dumps(about) + "\n")
            try:
                building.rename(path)
                return path
            except OSError:
                shutil.rmtree(building, ignore_errors=True)
                if not path.is_dir():  # another rank was not first: the disk is at fault
                    raise

    def _is_ours(self, folder: Path) -> bool:
        about, ended = _read(folder / "attempt.json"), _read(folder / "exit.json")
        if about.get("token") != self._token or self._is_unique:
            return about.get("token") == self._token
        if self._started - about["started"] > _FRESH_S:
            return False
        return ended.get("ended", self._started) > self._started - _ENDED_S

    def write(self, name: str, text: str) -> Path | None:
        """Puts `text` into the folder at the end of file `name`; None: it could not be."""
        folder = self.folder()
        if folder is None:
            return None
        try:
            with open(folder / name, "a", encoding="utf-8", errors="replace") as file:
                file.write(text)
            return folder / name
        except OSError:
            return None

    def end(self, code: Exit, cause: str, message: str, position: Position) -> bool | None:
        """Writes exit.json; False when another rank has ended the attempt, None without a disk.

        `cause`: done, stop, error, lost (a peer).
        """
        from reinforcer_tp.secrecy import redact

        folder = self.folder()
        if folder is None:
            return None
        content = {
            "code": int(code),
            "name": code.name,
            "cause": cause,
            "message": redact(" ".join(message.split())),
            "step": position.step,
            "start_step": position.start_step,
            "saved_step": position.saved_step,
            "phase": position.phase,
            "rank": self._rank,
            "world_size": self._world_size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": self._started,
            "ended": time.time(),
        }
        try:
            return _write_first(folder / "exit.json", json.dumps(content, indent=2) + "\n")
        except OSError:
            return None

    def ended(self) -> dict[str, Any]:
        """The content of exit.json; {} while there is none."""
        return _read(self._folder / "exit.json") if self._folder is not None else {}

    def lacks_progress(self, code: Exit, cause: str, position: Position) -> bool:
        """Whether a failure now is the third in a row at one step, none of them further on."""
        folder = self.folder()
        if folder is None or (cause != "lost" and code not in _NO_PROGRESS):
            return False
        number, before = int(folder.name), 0
        for earlier in reversed([n for n in _numbers(folder.parent) if n < number]):
            ended = _read(folder.parent / f"{earlier:04d}" / "exit.json")
            if not ended:  # killed without a word
                continue
            counts = ended["cause"] == "lost" or ended["code"] in _NO_PROGRESS
            if not counts or ended["step"] != position.step:
                break
            before += 1
        return before >= IN_A_ROW - 1

    def beat(self, position: Position) -> None:
        """Rewrites the heartbeat. Rank 0 only."""
        if self._folder is None:
            return
        now = {
            "step": position.step,
            "phase": position.phase,
            "time": time.time(),
            "attempt": int(self._folder.name),
        }
        building = building_name(self.log_dir)
        try:
            building.write_text(json.dumps(now) + "\n")
            os.replace(building, self.log_dir / "heartbeat")
        except OSError:
            with contextlib.suppress(OSError):
                building.unlink()


def _numbers(parent: Path) -> list[int]:
    return sorted(int(path.name) for path in parent.iterdir() if path.name.isdecimal())


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_first(path: Path, text: str) -> bool:
    """Whether `path` was not there; it is whole in any case."""
    building = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(building, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(building, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            if path.exists():
                return False
            os.replace(building, path)
        return True
    finally:
        with contextlib.suppress(OSError):
            building.unlink()
