"""What a rank says of itself to the others, and whom such beats accuse. Imports no torch."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from reinforcer_tp.lifecycle.position import PHASES

_PACKAGE = Path(__file__).resolve().parents[1]
_GROUPS = 4
_WAITING = (  # a main thread in these waits for other ranks, or may do so
    "/torch/distributed/",
    "/megatron/core/distributed/",
    "/megatron/core/pipeline_parallel/",
    "/megatron/core/tensor_parallel/",
    "/torch/autograd/graph.py",
)


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself."""

    number: int
    step: int | None
    phase: str
    ticks: int
    where: str  # innermost frame of ours in the main thread
    waits: bool | None  # the main thread is inside a collective; None = that cannot be seen
    pid: int
    start: int
    machine: str
    agreed: int | None = None  # the last step after which it has asked whether to stop
    is_done: bool = False
    next_rank: int = -1  # what it knows of the next one
    next_silent_s: float = 0.0

    def place(self) -> tuple[int, int, int]:
        """Grows while a run goes on."""
        step, agreed = (-1 if n is None else n for n in (self.step, self.agreed))
        return (step + agreed, PHASES.index(self.phase), self.ticks)

    def text(self, rank: int) -> str:
        step = "none" if self.step is None else self.step
        return f"rank {rank}, last step {step}, last phase {self.phase}"


def find_lost(
    beats: Mapping[int, Beat], stopped: Set[int], silent_s: float
) -> tuple[tuple[int, ...], str]:
    """(ranks that keep the others waiting, why); beats of all ranks that have sent one.

    A rank that is `stopped` or whose beats are, by what another knows of it; else one that waits
    for nobody while others wait; else, since it cannot be waiting for what it is ahead of, the
    fewer ones that are ahead (they left out a collective) or behind.
    """
    alive = {rank: beat for rank, beat in beats.items() if not beat.is_done}
    silence = {b.next_rank: b.next_silent_s for b in alive.values() if b.next_rank in alive}
    silent = tuple(sorted(r for r in alive if r in stopped or silence.get(r, 0) >= silent_s))
    if silent:
        return silent, "its process does not answer"
    is_blind = any(beat.waits is None for beat in alive.values())
    busy = tuple(sorted(r for r, b in alive.items() if b.waits is False))
    if busy and len(busy) < len(alive) and not is_blind:
        return busy, "the other ranks wait for it"
    places = {beat.place()[:2] for beat in alive.values()}
    if len(places) < 2:
        return (), ""
    first, last = max(places), min(places)
    ahead = tuple(sorted(r for r, b in alive.items() if b.place()[:2] == first))
    behind = tuple(sorted(r for r, b in alive.items() if b.place()[:2] == last))
    if is_blind or len(busy) == len(alive) or len(behind) < len(ahead):
        return behind, "it is behind the others"
    return ahead, "it has left out a collective that the others wait in"


def describe_all(beats: Mapping[int, Beat]) -> str:
    """Which ranks are where, the smallest groups first."""
    groups: dict[str, list[int]] = {}
    for rank, beat in sorted(beats.items()):
        step = "none" if beat.step is None else beat.step
        groups.setdefault(f"last step {step}, phase {beat.phase}, {beat.where}", []).append(rank)
    shown = sorted(groups.items(), key=lambda group: len(group[1]))[:_GROUPS]
    parts = [f"{len(ranks)} ranks from {ranks[0]}: {where}" for where, ranks in shown]
    return "; ".join(parts) + (f"; and {len(groups) - _GROUPS} more" * (len(groups) > _GROUPS))


def describe_frame(frame: FrameType | None) -> tuple[str, bool]:
    """(innermost frame of ours, whether what it calls waits for other ranks)."""
    waits = False
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            name = path.relative_to(_PACKAGE.parent)
            return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}", waits
        waits = waits or any(part in path.as_posix() for part in _WAITING)
        frame = frame.f_back
    return "no frame of ours", waits
