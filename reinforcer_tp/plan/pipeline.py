"""The order in which a pipeline takes micro-batches: who holds what, and who waits for whom.

Megatron-core's two schedules (schedules.py, get_pp_rank_microbatches): 1F1B, and with chunks the
interleaved one. A unit of work is one micro-batch through one chunk of a rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reinforcer_tp.plan.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One micro-batch forward or backward through one chunk of a rank."""

    is_forward: bool
    chunk: int
    micro_batch: int


def units(layout: Layout, pp_rank: int, num_micro_batches: int) -> Iterator[Unit]:
    """What the rank does in a step, in its order."""
    pp, vpp = layout.pp_size, layout.vpp_size
    total = num_micro_batches * vpp
    if pp == 1:
        warmup = 0
    elif vpp == 1:
        warmup = pp - pp_rank - 1
    else:
        warmup = 2 * (pp - pp_rank - 1) + (vpp - 1) * pp
    warmup = min(warmup, total)
    forward = [_unit(k, pp, vpp, is_forward=True) for k in range(total)]
    backward = [_unit(k, pp, vpp, is_forward=False) for k in range(total)]
    yield from forward[:warmup]
    for ahead, behind in zip(forward[warmup:], backward, strict=False):
        yield ahead
        yield behind
    yield from backward[total - warmup :]


def _unit(k: int, pp: int, vpp: int, *, is_forward: bool) -> Unit:
    """The k-th forward (backward) unit: chunks take turns after every pp micro-batches."""
    if vpp == 1:
        return Unit(is_forward=is_forward, chunk=0, micro_batch=k)
    group, within = divmod(k, pp * vpp)
    chunk, offset = divmod(within, pp)
    chunk = chunk if is_forward else vpp - 1 - chunk
    return Unit(is_forward=is_forward, chunk=chunk, micro_batch=group * pp + offset)


def peak_held(order: Sequence[Unit], saved: Sequence[int], peaks: Sequence[tuple[int, int]]) -> int:
    """Most bytes that the units of one rank hold at a time.

    saved: bytes that a chunk's forward keeps for its backward; peaks: most bytes in its (forward,
    backward) over what was held when it began.
    """
    held = most = 0
    for unit in order:
        forward, backward = peaks[unit.chunk]
        most = max(most, held + (forward if unit.is_forward else backward))
        held += saved[unit.chunk] if unit.is_forward else -saved[unit.chunk]
    return most


def duration_s(
    layout: Layout,
    num_micro_batches: int,
    seconds: Sequence[Sequence[tuple[float, float]]],  # [rank][chunk] -> (forward, backward)
    send_s: float,
) -> float:
    """Seconds until the last rank is done with its last unit: the bubble included."""
    pp, vpp = layout.pp_size, layout.vpp_size
    queues = [list(units(layout, rank, num_micro_batches)) for rank in range(pp)]
    done: dict[tuple[bool, int, int], float] = {}  # (is_forward, stage, micro-batch) -> when
    clocks, places = [0.0] * pp, [0] * pp
    last_stage, remaining = pp * vpp - 1, sum(map(len, queues))
    while remaining:
        before = remaining
        for rank, queue in enumerate(queues):
            while places[rank] < len(queue):
                unit = queue[places[rank]]
                stage = unit.chunk * pp + rank
                needed = _needs(unit.is_forward, stage, unit.micro_batch, last_stage)
                if needed is not None and needed not in done:
                    break
                arrival = 0.0
                if needed is not None:
                    is_own = (needed[1] - stage) % pp == 0
                    arrival = done[needed] + (0.0 if is_own else send_s)
                forward_s, backward_s = seconds[rank][unit.chunk]
                clocks[rank] = max(clocks[rank], arrival)
                clocks[rank] += forward_s if unit.is_forward else backward_s
                done[unit.is_forward, stage, unit.micro_batch] = clocks[rank]
                places[rank] += 1
                remaining -= 1
        assert remaining < before, "the schedule waits for itself"
    return max(clocks)


def _needs(
    is_forward: bool, stage: int, micro_batch: int, last_stage: int
) -> tuple[bool, int, int] | None:
    if is_forward:
        return (True, stage - 1, micro_batch) if stage else None
    if stage == last_stage:
        return True, stage, micro_batch
    return False, stage + 1, micro_batch
