"""What a piece of the program does to a device: bytes held, FLOPs, bytes moved, collectives.

Counts while fake tensors go through the operators, so it counts what the program does, not what a
formula says of it. Imports torch only.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_BLOCK = 512  # bytes; CUDA's caching allocator rounds up to it
# Their FLOPs are known to the caller alone: they depend on where segments begin.
_ATTENTION = ("_varlen_attn", "_scaled_dot_product")
_FREE = ("empty", "new_empty", *_ATTENTION)  # moves nothing, or counts elsewhere


@dataclass(kw_only=True)
class Work:
    """What was done between two moments."""

    flops: float = 0.0  # of matrix products, but for attention's and the operator's own kernels
    moved_bytes: float = 0.0  # read and written by everything else
    launches: int = 0  # operators that do something
    collectives: Counter = field(default_factory=Counter)  # (kind, ranks of the group) -> bytes
    saved_bytes: int = 0  # more held afterwards than before
    peak_bytes: int = 0  # most held in between, over what was held before


class Meter(TorchDispatchMode):
    """Enter it inside of FakeTensorMode; `measure` gives the Work of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.held_bytes = 0
        self._before = self._peak = 0
        self._known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._work = Work()

    @contextmanager
    def measure(self) -> Iterator[Work]:
        """The Work is complete when the block ends. Blocks do not nest."""
        work = self.begin()
        yield work
        self.end(work)

    def begin(self) -> Work:
        """From here on everything is counted in this Work, until `end`."""
        self._work, self._before, self._peak = Work(), self.held_bytes, self.held_bytes
        return self._work

    def end(self, work: Work) -> None:
        assert work is self._work, "measurements do not nest"
        work.saved_bytes = self.held_bytes - self._before
        work.peak_bytes = self._peak - self._before
        self._work = Work()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # a third of all calls
            return args[0].fake_device
        out = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        fresh = [self._hold(tensor) for tensor in made]
        self._count(func, args, given, made, is_view=not any(fresh), out=out)
        return out

    def _hold(self, tensor: Tensor) -> bool:
        """Whether the tensor's memory was not known before."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return False
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._known[storage] = size
        weakref.finalize(storage, self._release, size)
        self.held_bytes += size
        self._peak = max(self._peak, self.held_bytes)
        return True

    def _release(self, size: int) -> None:
        self.held_bytes -= size

    def _count(self, func, args, given, made, *, is_view: bool, out) -> None:
        work, packet = self._work, func.overloadpacket
        if func.namespace == "c10d":
            self._count_collective(func, args)
            return
        if packet in flop_registry and not func.__name__.startswith(_ATTENTION):
            work.flops += flop_registry[packet](*args, out_val=out)
            work.launches += 1
        elif (not is_view or func._schema.is_mutable) and not func.__name__.startswith(_FREE):
            work.moved_bytes += sum(map(_nbytes, given)) + sum(map(_nbytes, made))
            work.launches += 1

    def _count_collective(self, func, args) -> None:
        size = max(sum(map(_nbytes, tree_leaves(arg))) for arg in args[:2])
        groups = [each for each in args if isinstance(each, torch.ScriptObject)]
        count = dist.ProcessGroup.unbox(groups[0]).size() if groups else 1
        self._work.collectives[func.__name__.split(".")[0], count] += size


def _nbytes(value: object) -> int:
    return value.numel() * value.itemsize if isinstance(value, Tensor) else 0
