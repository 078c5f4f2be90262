"""How this process ends other than by returning: one line, exit.json, an exit code; once.

The main thread ends it after an error or a stop, the thread of `stops` after a signal, the thread
of `peers` when another rank is lost. Whoever begins first does it; the others let it.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from reinforcer_tp.lifecycle.attempts import Attempt
from reinforcer_tp.lifecycle.exits import Exit, describe, error_line, known_exit
from reinforcer_tp.lifecycle.position import Position
from reinforcer_tp.lifecycle.processes import kill_children, machine

if TYPE_CHECKING:
    from reinforcer_tp.lifecycle.peers import Peers

_SPEAKER_HEAD_START_S = 20.0
_GIVE_UP = "; the third failure in a row without progress: starting again does not help"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why all ranks end; what one rank tells the others."""

    code: int
    cause: str  # error (of one rank), lost (a rank), stop (one rank was told to leave at once)
    message: str
    machine: str  # where the one who tells runs
    culprits: tuple[int, ...] = ()  # lost ranks

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Failure":
        content = json.loads(text)
        return cls(**content | {"culprits": tuple(content["culprits"])})


class Ending:
    """The end of this process, and what it has to know: where it is, its attempt, its peers."""

    def __init__(self, position: Position) -> None:
        self.position = position
        self.attempt: Attempt | None = None  # once log_dir is known and may be written to
        self.peers: Peers | None = None  # once there are some
        self.rank = int(os.environ.get("RANK", "0"))
        self.is_speaker = os.environ.get("LOCAL_RANK", "0") == "0"
        self.waits_with: int | None = None  # exit code of a process that only waits for another
        self._begun = threading.Lock()

    def begin(self) -> bool:
        """True for the first thread that asks."""
        return self._begun.acquire(blocking=False)

    def done(self) -> int:
        """All steps are done."""
        if not self.begin():
            time.sleep(60.0)  # another thread is ending this process
        if self.peers is not None:
            self.peers.close()
        if self.attempt is not None and self.rank == 0:
            self.attempt.end(Exit.DONE, "done", "all steps are done", self.position)
        return Exit.DONE

    def stopped(self, message: str) -> int:
        """All ranks have agreed to stop."""
        if not self.begin():
            time.sleep(60.0)
        if self.peers is not None:
            self.peers.close()
            # torchrun ends all once one has ended so; rank 0 may still be closing its loggers.
            self.peers.wait_for_rank_zero(_SPEAKER_HEAD_START_S)
        if self.rank == 0:
            if self.attempt is not None:
                self.attempt.end(Exit.REQUEUE, "stop", message, self.position)
            _print(error_line(Exit.REQUEUE, message))
        return Exit.REQUEUE

    def failed(self, error: Exception) -> int:
        """This rank's main thread raised `error`."""
        code = known_exit(error, self.position.phase)
        if code is None and self.peers is not None:
            self.peers.explain(error)  # ends this process if it was another rank's fault
        if not self.begin():
            time.sleep(60.0)
        text = describe(error)
        if code is None:
            text = self._with_traceback(error, text)
        elif "REINFORCER_TP_TRACEBACK" in os.environ:
            _print(_formatted(error))
        return self._own_failure(code or Exit.INTERNAL, text)

    def _with_traceback(self, error: Exception, text: str) -> str:
        text += f" (rank {self.rank}, {self.position.text()}"
        path = None
        if self.attempt is not None:
            path = self.attempt.write(f"traceback_rank{self.rank}.txt", _formatted(error))
        if "REINFORCER_TP_TRACEBACK" in os.environ:
            _print(_formatted(error))
        elif path is None:
            text += "; REINFORCER_TP_TRACEBACK=1 in the environment shows the traceback"
        return text + (f"; traceback: {path})" if path is not None else ")")

    def _own_failure(self, code: Exit, text: str, cause: str = "error") -> int:
        """Records, says and tells the others; returns the exit code."""
        attempt, is_first = self.attempt, None
        if attempt is not None:
            if attempt.lacks_progress(code, cause, self.position):
                code, text = Exit.NO_RESTART, text + _GIVE_UP
            is_first = attempt.end(code, cause, text, self.position)
        if is_first is None and not self.is_speaker and self.peers is None and cause != "stop":
            # All ranks find such an error alike, and torchrun ends the rest after the first end.
            self.waits_with = code
            time.sleep(_SPEAKER_HEAD_START_S)
        # Without an attempt nobody knows who was first; a launcher that ends all signals each.
        if is_first or (is_first is None and (self.is_speaker or cause != "stop")):
            _print(error_line(code, text))
        elif is_first is False:
            code = Exit(attempt.ended().get("code", code))
        if self.peers is not None:
            failure = Failure(code=code, cause=cause, message=text, machine=machine())
            self.peers.tell(failure)
        return code

    def leave_now(self, text: str) -> None:
        """From another thread: this rank was told to go, whatever the main thread is doing."""
        if self.begin():
            leave(self._own_failure(Exit.REQUEUE, text, cause="stop"))

    def follow(self, failure: Failure, details: str, at_last: Callable[[], None]) -> None:
        """From another thread: all ranks end because of `failure`; `details` go to a file."""
        if not self.begin():
            return
        attempt, is_first, text = self.attempt, False, failure.message
        if attempt is not None and failure.cause == "lost":
            path = attempt.write(f"stacks_rank{self.rank}.txt", details)
            text += f"; stacks of all threads: {path.parent}" if path is not None else ""
            is_first = attempt.end(Exit(failure.code), "lost", failure.message, self.position)
        is_told = failure.cause != "lost" and failure.machine == machine()
        if (is_first or self.is_speaker) and not is_told:
            _print(error_line(failure.code, text))
        at_last()
        leave(failure.code)

    def lost(self, message: str, culprits: tuple[int, ...]) -> Failure:
        """The failure that this rank tells the others when it has found lost ranks."""
        code, attempt = Exit.REQUEUE, self.attempt
        if attempt is not None and attempt.lacks_progress(code, "lost", self.position):
            code, message = Exit.NO_RESTART, message + _GIVE_UP
        else:
            message += "; the same command goes on from the newest checkpoint"
        return Failure(
            code=code, cause="lost", message=message, machine=machine(), culprits=culprits
        )


def leave(code: int) -> None:
    """Ends the process at once: no destructor waits for a peer, no child stays behind."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    kill_children()
    os._exit(code)


def _formatted(error: Exception) -> str:
    from reinforcer_tp.secrecy import redact

    return redact("".join(traceback.format_exception(error)))


def _print(text: str) -> None:
    with contextlib.suppress(OSError):
        # os.write: the main thread may hold the stream's lock for ever
        os.write(2, (text.rstrip("\n") + "\n").encode(errors="replace"))
