"""Memory of a piece of CPU code, from the allocator's own events."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.measure import live_bytes


def peak_bytes(fn: Callable[[], object]) -> int:
    """Most bytes of tensors that lived at once during `fn`, beside those that existed before."""
    return max(live_bytes(fn)[0], default=0)


def held_bytes(fn: Callable[[], object]) -> int:
    """Bytes of tensors that `fn` made and that live as long as its result."""
    return [0, *live_bytes(fn)[0]][-1]
