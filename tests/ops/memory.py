"""Memory of a piece of CPU code, from the allocator's own events."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def peak_bytes(fn: Callable[[], object]) -> int:
    """Most bytes of tensors that lived at once during `fn`, beside those that existed before."""
    return max(_live_bytes(fn), default=0)


def held_bytes(fn: Callable[[], object]) -> int:
    """Bytes of tensors that `fn` made and that live as long as its result."""
    return ([0, *_live_bytes(fn)])[-1]


def _live_bytes(fn: Callable[[], object]) -> list[int]:
    """After each event of the allocator; `fn`'s result is still there after the last."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = fn()
    del result
    events = trace.profiler.kineto_results.events()
    return list(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
