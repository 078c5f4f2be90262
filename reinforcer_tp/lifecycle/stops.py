"""Stops that were asked for: signals, a file, a deadline; agreed by all ranks between two steps.

`Stops` is made before anything heavy is imported. A signal is seen by a thread of its own through
signal.set_wakeup_fd, so that it counts while the main thread is in C++: imports, the rendezvous, a
collective. In the loop a signal is a request, and the same one again ends the process at once, as
any does before and after the loop, with the same exit code: what is written is written whole.

SIGUSR2 writes the stacks of all threads to stderr and to the attempt's folder. Imports no torch.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

from reinforcer_tp.lifecycle.attempts import Attempt
from reinforcer_tp.lifecycle.ending import Ending, leave
from reinforcer_tp.lifecycle.position import STEP_PARTS, Position

_SAME_BURST_S = 2.0  # torchrun forwards a signal that the terminal has sent already
_LOOK_AT_PEERS_S = 0.5  # before a signal is taken for the cause: a peer may have died first
_BEAT_S = 30.0  # between heartbeats within a step, a validation, a sweep
_UNKNOWN_SAVE_S = 60.0  # of a save, while none was seen; at most a tenth of the limit


class Reason(IntEnum):
    """Why a run stops; where ranks differ, the largest counts."""

    DEADLINE = 1
    STOP_FILE = 2
    LAUNCHER = 3
    SIGUSR1 = 4
    SIGINT = 5
    SIGTERM = 6
    SAVE = 7  # an asynchronous one has failed, and the next one raises its error

    @property
    def text(self) -> str:
        named = {
            Reason.DEADLINE: "checkpointing.checkpoint_must_save_by",
            Reason.STOP_FILE: "the stop file",
            Reason.LAUNCHER: "the launcher, which has died",
            Reason.SAVE: "a checkpoint that could not be written",
        }
        return named.get(self, self.name)


_SIGNALS = {
    signal.SIGTERM: Reason.SIGTERM,
    signal.SIGINT: Reason.SIGINT,
    signal.SIGUSR1: Reason.SIGUSR1,
}


class Stopped(Exception):
    """Raised on every rank after `agree` gave a reason; `saved` is the checkpoint, if there is."""

    def __init__(self, reason: Reason, *, step: int, total_steps: int, saved: Path | None) -> None:
        kept = f"saved {saved}; the same command goes on" if saved else "no checkpoint was saved"
        super().__init__(f"stopped by {reason.text} after step {step} of {total_steps}; {kept}")
        self.reason, self.step, self.saved = reason, step, saved


class Stops:
    """Requests to stop, and the position that they and the watch over peers work with."""

    def __init__(self) -> None:
        """Handlers stand from here on. Main thread only."""
        self.position = Position()
        self.ending = Ending(self.position)
        self._begin = time.monotonic()
        self._parent = os.getppid()
        self._in_loop = False
        self._requested: Reason | None = None
        self._first_at: dict[Reason, float] = {}  # a signal -> when it came first
        self._stop_file: Path | None = None
        self._limit_s: float | None = None
        self._boundary_at = self._beat_at = self._begin
        self._step_s = 0.0  # the longest, with what came before it, such as a validation
        self._last_step_s = 0.0
        self._num_steps = 0
        self._save_s: float | None = None  # of the longest save
        self._listen()

    def _listen(self) -> None:
        receiver, self._sender = os.pipe()
        os.set_blocking(self._sender, False)
        self._wakeup_before = signal.set_wakeup_fd(self._sender, warn_on_full_buffer=False)
        self._before = {
            number: signal.signal(number, _noticed) for number in (*_SIGNALS, signal.SIGUSR2)
        }
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no stderr to write to
            faulthandler.register(signal.SIGUSR2, sys.stderr, all_threads=True, chain=True)
        os.register_at_fork(after_in_child=self._close_in_child)  # a child's signals are its own
        thread = threading.Thread(target=self._serve, args=(receiver,), name="stops", daemon=True)
        thread.start()

    def _close_in_child(self) -> None:
        """A signal ends a child, as if there were no handlers, and is not the parent's."""
        if self._sender >= 0:
            self.close()
            for number in self._before:
                signal.signal(number, signal.SIG_DFL)

    def close(self) -> None:
        """Puts back what was there."""
        if self._sender < 0:
            return
        signal.set_wakeup_fd(self._wakeup_before)
        faulthandler.unregister(signal.SIGUSR2)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._sender)  # the thread reads the end of the pipe
        self._sender = -1

    def ignore(self) -> None:
        """The process has said how it ended: no signal changes that any more."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def __enter__(self) -> "Stops":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, receiver: int) -> None:
        while received := os.read(receiver, 64):
            for number in received:
                if number == signal.SIGUSR2:
                    self._write_stacks()
                elif number in _SIGNALS:
                    self._on_signal(_SIGNALS[signal.Signals(number)])
        os.close(receiver)

    def _on_signal(self, reason: Reason) -> None:
        if self.ending.waits_with is not None:
            leave(self.ending.waits_with)
        now = time.monotonic()
        first_at = self._first_at.setdefault(reason, now)
        if self._in_loop:
            if self._requested is None:
                self.request(reason)
                return
            if now - first_at < _SAME_BURST_S:  # also another one: preempted near the time limit
                return
        if self.ending.peers is not None:
            self.ending.peers.look_now(_LOOK_AT_PEERS_S)
            if self._in_loop and self._requested is None:  # it has begun meanwhile
                self.request(reason)
                return
        where = f"in phase {self.position.phase}" if self.position.step is None else "at once"
        text = f"stopped by {reason.text} {where}, {self.position.text()}; the same command goes on"
        self.ending.leave_now(text)

    def _write_stacks(self) -> None:
        if self.ending.attempt is not None:
            self.ending.attempt.write(f"stacks_rank{self.ending.rank}.txt", all_stacks())

    def request(self, reason: Reason) -> None:
        """As a signal does: the next `agree` gives `reason`, unless there is one already."""
        if self._requested is None:
            self._requested = reason

    def open_run(self, log_dir: Path, limit_s: float | None) -> None:
        """From here on there is a folder that this run may write to; `limit_s` from the start."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.ending.attempt = Attempt(log_dir, self.ending.rank, world_size)
        if self.ending.rank == 0:
            self.ending.attempt.folder()
        self._stop_file, self._limit_s = log_dir / "stop", limit_s

    def phase(self, name: str) -> None:
        """A name of position.PHASES begins."""
        self.position.enter(name)
        self._publish()
        if name not in STEP_PARTS:
            self._beat()

    def saved(self, step: int, seconds: float) -> None:
        """A checkpoint of `step` is on the disk, which took `seconds`."""
        self.position.saved_step = step
        self._save_s = max(seconds, self._save_s or 0.0)

    def tick(self) -> None:
        """Something has moved within a phase."""
        self.position.tick()
        if time.monotonic() - self._beat_at >= _BEAT_S:
            self._beat()

    def step(self, step: int) -> None:
        """`step` has finished."""
        now = time.monotonic()
        self._last_step_s = now - self._boundary_at  # with what came between two steps
        if self._num_steps > 0:  # the first one compiles
            self._step_s = max(self._step_s, self._last_step_s)
        self._num_steps += 1
        self._boundary_at = now
        self.position.step = step
        self.position.tick()
        self._publish()
        self._beat()

    def _publish(self) -> None:
        if self.ending.peers is not None:
            self.ending.peers.wake()

    def _beat(self) -> None:
        self._beat_at = time.monotonic()
        if self.ending.rank == 0 and self.ending.attempt is not None:
            self.ending.attempt.beat(self.position)

    def begin_loop(self, start_step: int) -> None:
        """From here on `agree` is called after each step."""
        self.position.step = self.position.start_step = start_step
        self.position.saved_step = start_step or None
        self._boundary_at = time.monotonic()
        self._in_loop = True

    def end_loop(self) -> None:
        """No `agree` follows: a signal ends the process at once again."""
        self._in_loop = False

    def agree(self, topology: Any) -> Reason | None:
        """Why all ranks stop now, the same on every rank. Collective: one number of each."""
        code = int(self._wanted() or 0)
        if topology.world_size > 1:
            import torch
            import torch.distributed as dist

            found = torch.tensor([code], dtype=torch.int32, device=topology.device)
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
            code = int(found.item())
        self.position.agreed = self.position.step
        if code and self.ending.rank == 0 and self._stop_file is not None:
            with contextlib.suppress(OSError):  # else the same command would stop again
                self._stop_file.unlink()
        return Reason(code) if code else None

    def _wanted(self) -> Reason | None:
        if self._requested is not None:
            return self._requested
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self._parent:
            return Reason.LAUNCHER
        if self.ending.rank != 0:
            return None
        if self._stop_file is not None and os.path.isfile(self._stop_file):
            return Reason.STOP_FILE
        return Reason.DEADLINE if self._is_late() else None

    def _is_late(self) -> bool:
        """Whether another step as long as the longest, and then a save, might not fit any more."""
        if self._limit_s is None:
            return False
        save_s = self._save_s
        if save_s is None:
            save_s = min(_UNKNOWN_SAVE_S, 0.1 * self._limit_s)
        needed = max(self._step_s, self._last_step_s) + 1.5 * save_s
        return time.monotonic() - self._begin + needed >= self._limit_s


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Programs started within do not hear what is meant for ranks: Slurm signals all of a step.

    A blocked signal stays blocked in a new program, where a handler does not stay. The threads of
    `Stops` go on hearing.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*_SIGNALS, signal.SIGUSR2))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def all_stacks() -> str:
    """Where each thread of this process is."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return f"{time.ctime()}\n{file.read()}\n"


def _noticed(number: int, frame: object) -> None:
    """Python needs a function; the thread acts."""
