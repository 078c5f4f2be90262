"""Operands, tile sizes and checks for the tests of impl="triton".

The same tests run in Triton's interpreter without a GPU (tests/conftest.py) and on the GPU with
one. The interpreter's time goes with the number of tiles, so it gets large ones.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from kernels import linear_logprob_triton
from kernels.blocks import Blocks
from tests.ops import cases
from tests.ops.dense import dense_result, error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BIG = Blocks(block_n=128, block_v=4096, block_d=64, slices=2)
SMALL = Blocks(block_n=32, block_v=64, block_d=32, slices=2, num_warps=4, num_stages=2)
EVERYTHING = 2**40  # a cache budget that holds all columns
# Of the types that the kernels take.
BARS = {dtype: bars for dtype, bars in cases.BARS.items() if dtype != torch.float64}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty and its kind give NaN, so that nothing may be read before it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def use_blocks(monkeypatch, blocks: Blocks) -> None:
    if DEVICE == "cpu" or blocks is not BIG:  # on a GPU its table has the large tiles
        monkeypatch.setattr(linear_logprob_triton, "blocks_for", lambda *_: blocks)


@pytest.fixture
def big_tiles(monkeypatch):
    use_blocks(monkeypatch, BIG)


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles for small problems, and a backward of one column block at a time."""
    use_blocks(monkeypatch, SMALL)
    monkeypatch.setattr(linear_logprob_triton, "SCRATCH_BYTES", 0)


def budget_of(tiles: int, n: int, blocks: Blocks = SMALL, itemsize: int = 4) -> int:
    """The cache budget that holds exactly so many column blocks."""
    return tiles * n * (blocks.block_v * itemsize + 4 * blocks.slices)


def make(*shape, **options):
    return cases.make(*shape, **options, device=DEVICE)


def run(operands, labels, grad_logps, grad_entropy=None, impl="triton", **options):
    return cases.run(operands, labels, grad_logps, grad_entropy, impl=impl, **options)


def expect(operands, labels, grad_logps, grad_entropy=None, **options):
    return dense_result(
        labels=labels, grad_logps=grad_logps, grad_entropy=grad_entropy, **operands, **options
    )


def check(
    operands, labels, grad_logps, grad_entropy=None, *,
    forward_bar=None, grad_bar=None, cache_budget_bytes=0, **options,
):  # fmt: skip
    """Against the float64 form of the same operands; returns what `run` does."""
    dtype = operands["hidden"].dtype
    forward_bar, grad_bar = forward_bar or BARS[dtype][0], grad_bar or BARS[dtype][1]
    expected = expect(operands, labels, grad_logps, grad_entropy, **options)
    options["cache_budget_bytes"] = cache_budget_bytes
    logps, entropy, grads = run(operands, labels, grad_logps, grad_entropy, **options)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected.logps, rtol=1e-6, atol=forward_bar)
    if entropy is not None:
        torch.testing.assert_close(
            entropy.double(), expected.entropy, rtol=1e-6, atol=2 * forward_bar
        )
    for name, grad in grads.items():
        assert grad.dtype == operands[name].dtype
        assert error(grad, expected.grads[name]) <= grad_bar, name
    return logps, entropy, grads


def untouched(numel: int) -> Tensor:
    """float32 memory in which only the pages that somebody writes or reads take up any RAM.

    2^31 elements lie before it, so that an offset that has wrapped is a wrong number, no crash.
    """
    if DEVICE == "cuda":
        return torch.zeros(2**31 + numel, device=DEVICE)[2**31 :]
    no_reserve = 0x4000  # MAP_NORESERVE of Linux, which Python 3.11 does not name
    num_bytes = 4 * (2**31 + numel)
    pages = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(pages, dtype=torch.float32)[2**31 :]


class Recorder:
    """Stands for a kernel: notes grid, integers and flags of its launches; may go on to it."""

    def __init__(self, kernel=None):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **flags):
            # No tensor is noted: that would keep it alive.
            self.launches.append((grid[0], [x for x in args if isinstance(x, int)], flags))
            if self.kernel is not None:
                self.kernel[grid](*args, **flags)

        return launch


KERNELS = (
    "linear_logprob_fwd_kernel",
    "linear_logprob_bwd_kernel",
    "merge_kernel",
    "cached_dlogits_kernel",
)


@contextmanager
def recorded_launches(*, execute: bool = True) -> Iterator[dict[str, list]]:
    """Launches of each kernel by its name; without `execute` they write nothing."""
    saved = {name: getattr(linear_logprob_triton, name) for name in KERNELS}
    recorders = {name: Recorder(saved[name] if execute else None) for name in KERNELS}
    try:
        for name, recorder in recorders.items():
            setattr(linear_logprob_triton, name, recorder)
        yield {name: recorder.launches for name, recorder in recorders.items()}
    finally:
        for name, kernel in saved.items():
            setattr(linear_logprob_triton, name, kernel)
