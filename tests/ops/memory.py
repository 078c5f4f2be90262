"""Peak memory of a piece of CPU code, from the allocator's own events."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(fn: Callable[[], object]) -> int:
    """Most bytes of tensors that lived at once during `fn`, beside those that existed before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        fn()
    live = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
