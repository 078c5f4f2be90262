"""Watches the other ranks, names the one that is dead or hangs, and ends all of them.

Each rank writes a beat (where it is) to the rendezvous store, reads that of the next rank and one
key that is set once some rank knows why all must end: three small operations a second, however
many ranks there are. The thread has a connection of its own: a client waits while another call on
it waits, and the main thread may be in a collective for ever.

A rank is lost when its process is gone (seen at once on the same machine), when its beats stop for
`timeout_s`, or when the run has not moved for `timeout_s` and it is the one that others wait for.
"""

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

from reinforcer_tp.lifecycle.beats import Beat, describe_all, describe_frame, find_lost
from reinforcer_tp.lifecycle.ending import Ending, Failure
from reinforcer_tp.lifecycle.position import LIMITED
from reinforcer_tp.lifecycle.processes import machine, process_start, process_state
from reinforcer_tp.lifecycle.stops import all_stacks

INTERVAL_S = 1.0
_SHORTEST_S = 0.05  # between two beats, when steps are short
_CONNECT_S = 86_400.0  # peers may prepare data for hours
_CALL_S = 30.0
_AGAIN_S = 2.0  # for another connection after one broke
_PAUSE_S = 5.0  # between two looks of a process that runs
_QUIET_S = 60.0  # a thread may be kept from running this long where files are read and written
_BROKEN_S = 6.0  # within which a peer's death is seen after a collective has failed
_OTHER_S = 0.3  # likewise after another error
_FOLLOW_S = 1.5  # in which a hanging rank may leave by itself
_BROKEN = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe")


def watch_peers(ending: Ending, world_size: int, timeout_s: float) -> None:
    """Starts the thread, where there are peers."""
    if world_size > 1:
        ending.peers = Peers(ending, world_size=world_size, timeout_s=timeout_s)
        ending.peers.start()


class Peers:
    """The thread that watches; `start` it when the rendezvous begins."""

    def __init__(self, ending: Ending, *, world_size: int, timeout_s: float) -> None:
        self._ending, self._world_size, self._timeout_s = ending, world_size, timeout_s
        self._interval_s = min(INTERVAL_S, timeout_s / 5)
        self._position, self._rank = ending.position, ending.rank
        self._main = threading.main_thread().ident
        self._machine, self._start_ticks = machine(), process_start(os.getpid())
        self._next = (self._rank + 1) % world_size
        self._seen: Beat | None = None  # of the next rank
        self._seen_at = time.monotonic()
        self._looked_at = time.monotonic()
        self._number, self._is_done, self._hurries = 0, False, False
        self._store: Any = None
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """The position has changed."""
        self._wake.set()

    def close(self) -> None:
        """This rank has finished: nobody must miss it. Main thread."""
        self._is_done = True
        self._wake.set()
        self._thread.join(timeout=3 * self._interval_s + 1)
        if self._rank == 0 and self._store is not None and not _agent_holds_store():
            deadline = time.monotonic() + 3 * self._interval_s
            with contextlib.suppress(RuntimeError):
                while time.monotonic() < deadline and not self._all_done():
                    time.sleep(0.05)

    def wait_for_rank_zero(self, seconds: float) -> None:
        """Until it has finished, at most `seconds`. After `close`."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):
            while self._rank != 0 and self._store is not None and time.monotonic() < deadline:
                beat = self._read(0)
                if beat is None or beat.is_done:
                    return
                time.sleep(0.05)

    def _all_done(self) -> bool:
        beats = [self._read(rank) for rank in range(self._world_size)]
        return all(beat is not None and beat.is_done for beat in beats)

    def tell(self, failure: Failure) -> None:
        """All ranks are to end because of this one. Any thread; never raises."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.compare_set("failure", "", failure.to_json())
            self._linger()

    def look_now(self, seconds: float) -> None:
        """Returns after `seconds`, unless a lost rank or a failure is found: then not at all."""
        self._hurries = True
        self._wake.set()
        time.sleep(seconds)
        self._hurries = False

    def explain(self, error: BaseException) -> None:
        """Like `look_now` where `error` is one that a peer's death makes."""
        names = {kind.__name__ for kind in type(error).__mro__}
        is_broken = bool(names & {"DistError", "DistBackendError"}) or (
            isinstance(error, RuntimeError) and any(word in str(error) for word in _BROKEN)
        )
        self.look_now(_BROKEN_S if is_broken else _OTHER_S)

    def _watch(self) -> None:
        try:
            self._store = _connect()
        except RuntimeError:
            return  # the rendezvous itself fails and says why
        while True:
            is_last = self._is_done  # a beat that is on its way meanwhile says no goodbye
            try:
                self._look()
            except RuntimeError as error:
                if self._is_done:
                    return
                if not self._connect_again():
                    self._without_store(error)
                    return
            if is_last:
                return
            time.sleep(min(_SHORTEST_S, self._interval_s))
            self._wake.wait(0.1 * self._interval_s if self._hurries else self._interval_s)
            self._wake.clear()

    def _connect_again(self) -> bool:
        """A connection may break where the store lives on."""
        try:
            self._store = _connect(_AGAIN_S)
            self._store.set(f"beat{self._rank}", json.dumps(asdict(self._beat())))
        except RuntimeError:
            return False
        return True

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked_at > max(5 * self._interval_s, _PAUSE_S):
            # This process was suspended, and the others probably with it: count anew.
            self._seen_at = self._position.moved_at = now
        self._looked_at = now
        self._store.set(f"beat{self._rank}", json.dumps(asdict(self._beat())))
        if self._store.check(["failure"]):
            self._follow(Failure.from_json(self._store.get("failure").decode()))
        if self._is_done:
            return
        self._look_at_next()
        still_s = time.monotonic() - self._position.moved_at
        if self._position.phase in LIMITED and still_s > self._timeout_s:
            self._look_at_all()

    def _beat(self) -> Beat:
        frames = sys._current_frames()
        where, waits = describe_frame(frames.get(self._main or 0))
        self._number += 1
        now = time.monotonic()
        return Beat(
            number=self._number,
            step=self._position.step,
            phase=self._position.phase,
            ticks=self._position.ticks,
            agreed=self._position.agreed,
            where=where,
            # With a device the host waits in any frame that reads a number from it.
            waits=None if _has_device() else waits,
            pid=os.getpid(),
            start=self._start_ticks,
            machine=self._machine,
            is_done=self._is_done,
            next_rank=self._next if self._seen is not None else -1,
            next_silent_s=now - self._seen_at,
        )

    def _read(self, rank: int) -> Beat | None:
        if not self._store.check([f"beat{rank}"]):
            return None
        return Beat(**json.loads(self._store.get(f"beat{rank}")))

    def _look_at_next(self) -> None:
        beat = self._read(self._next)
        if beat is None:
            return  # it is not there yet; only a launcher knows whether it will be
        if beat.is_done:
            self._next, self._seen = (self._next + 1) % self._world_size, None
            return
        if self._seen is None or beat.number != self._seen.number:
            self._seen, self._seen_at = beat, time.monotonic()
            return
        silent_s, state = time.monotonic() - self._seen_at, "?"
        if beat.machine == self._machine:
            state = process_state(beat.pid, beat.start)
            if not state and self._read(self._next) == beat:  # it did not say goodbye just now
                why = f"its process {beat.pid} on {_host(beat)} is gone (killed, out of memory?)"
                self._tell_lost({self._next: beat}, why)
        limit_s = self._timeout_s
        if state != "T" and beat.phase not in LIMITED:
            limit_s = max(limit_s, _QUIET_S)
        if silent_s > limit_s:
            self._tell_lost({self._next: beat}, _silence(beat, state, silent_s))

    def _look_at_all(self) -> None:
        # Few do it at once; not by the global generator, whose state is the run's.
        time.sleep(random.Random().random() * min(self._interval_s, self._rank / 100))
        if self._store.check(["failure"]):
            return  # seen in the next round
        beats = {rank: self._read(rank) for rank in range(self._world_size)}
        known = {rank: beat for rank, beat in beats.items() if beat is not None}
        mine = replace(known[self._rank], next_silent_s=time.monotonic() - self._seen_at)
        stopped = {rank for rank, beat in known.items() if self._is_stopped(beat)}
        lost, why = find_lost(known | {self._rank: mine}, stopped, silent_s=3 * self._interval_s)
        still = f"no progress for {self._timeout_s:g} s (cluster.hang_timeout_s)"
        if lost:
            self._tell_lost({rank: known[rank] for rank in lost}, f"{still}; {why}")
        self._tell_lost({}, f"{still} and no rank stands out: {describe_all(known)}")

    def _is_stopped(self, beat: Beat) -> bool:
        here = beat.machine == self._machine and not beat.is_done
        return here and process_state(beat.pid, beat.start) in ("", "T")

    def _tell_lost(self, lost: Mapping[int, Beat], why: str) -> None:
        """Ends this process, with the first failure that any rank has told."""
        named = [self._at_least(beat).text(rank) for rank, beat in sorted(lost.items())[:4]]
        if lost:
            beat = lost[min(lost)]
            more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
            why = f"lost {'; '.join(named)}{more}: {why}; it was at {beat.where}"
        failure = self._ending.lost(why, tuple(sorted(lost)))
        told = self._store.compare_set("failure", "", failure.to_json())
        self._follow(Failure.from_json(told.decode()))

    def _at_least(self, beat: Beat) -> Beat:
        """A beat is some time old; that rank has finished what all ranks agreed on after it."""
        agreed = self._position.agreed
        if agreed is None or (beat.step is not None and beat.step >= agreed):
            return beat
        return replace(beat, step=agreed, phase="step")

    def _follow(self, failure: Failure) -> None:
        beats = [self._read(rank) for rank in failure.culprits]

        def end_culprits() -> None:
            for beat in beats:
                if beat is not None and beat.machine == self._machine and beat.pid != os.getpid():
                    _end_process(beat)
            self._linger()

        self._ending.follow(failure, all_stacks(), end_culprits)

    def _linger(self) -> None:
        """Where rank 0 holds the store, it is the last to leave."""
        if self._rank == 0 and not _agent_holds_store():
            time.sleep(3 * self._interval_s)

    def _without_store(self, error: BaseException) -> None:
        """The store is gone: the launcher's, who ends us, or rank 0's, which is dead then."""
        if not _agent_holds_store() and self._rank != 0:
            time.sleep(2 * self._interval_s)  # the end of the run is not its death
            if self._is_done:
                return
            why = f"lost rank 0, {self._position.text()} (of this rank): it held the store"
            self._ending.follow(self._ending.lost(why, (0,)), all_stacks(), _nothing)
            return
        while not self._is_done:
            still_s = time.monotonic() - self._position.moved_at
            if self._position.phase in LIMITED and still_s > self._timeout_s:
                why = f"no progress for {still_s:.0f} s and the launcher's store is gone ({error})"
                why = f"{why.splitlines()[0]}; rank {self._rank}, {self._position.text()}"
                self._ending.follow(self._ending.lost(why, ()), all_stacks(), _nothing)
            self._wake.wait(self._interval_s)


def _end_process(beat: Beat) -> None:
    """A stopped process, or one that lets none of its threads run, cannot end itself."""
    deadline = time.monotonic() + _FOLLOW_S
    while (state := process_state(beat.pid, beat.start)) and state != "T":
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    if state:
        with contextlib.suppress(OSError):
            os.kill(beat.pid, signal.SIGKILL)


def _nothing() -> None:
    """There is no process to end."""


def _host(beat: Beat) -> str:
    return beat.machine.split()[0]


def _silence(beat: Beat, state: str, silent_s: float) -> str:
    stopped = " (it is stopped)" if state == "T" else ""
    return f"process {beat.pid} on {_host(beat)} has been silent for {silent_s:.1f} s{stopped}"


def _has_device() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def _agent_holds_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect(seconds: float = _CONNECT_S) -> Any:
    """A client of its own of the store that init_process_group uses. Raises RuntimeError."""
    import torch.distributed as dist

    client = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
    )
    client.set_timeout(timedelta(seconds=_CALL_S))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"reinforcer_tp/lifecycle/peers/{attempt}", client)
