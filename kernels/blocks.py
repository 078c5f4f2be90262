"""Tile sizes of the Triton kernels by architecture, hidden size and operand type.

Ranked by reading the machine code of each entry (`python -m benchmarks.codegen`), not by timing.
Static: tuning while training would stall ranks that wait for each other, and N changes every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Blocks:
    block_n: int = 128
    block_v: int = 128
    block_d: int = 64
    num_warps: int = 8
    num_stages: int = 4
    slices: int = 1  # parts of a tile's columns that the epilogue takes one after the other
    descriptors: bool = False  # tensor descriptors and a persistent grid
    flatten: bool = False
    warp_specialize: bool = False
    maxnreg: int | None = None


SMALL_D = 1024  # up to here the epilogue weighs more than the GEMM's tile

# (arch, hidden size class) for 16-bit operands with D a multiple of 8
BLOCK_TABLE = {
    (80, "small"): Blocks(),
    (80, "large"): Blocks(block_v=256),
    (90, "small"): Blocks(num_stages=3, slices=4, maxnreg=128),
    (90, "large"): Blocks(block_v=256, slices=2, descriptors=True),
    (100, "small"): Blocks(descriptors=True, flatten=True, warp_specialize=True),
    (100, "large"): Blocks(block_v=256, slices=4, descriptors=True),
}
UNALIGNED = Blocks(num_stages=3)  # D not a multiple of 8: rows do not begin on 16 bytes
FLOAT32 = Blocks(block_n=64, block_v=64, block_d=16, num_warps=4, num_stages=3)
# Architectures without an entry: at most 48 KiB of shared memory.
OTHER = Blocks(block_d=32, num_stages=3)


def blocks_for(arch: int, d: int, dtype: torch.dtype, aligned: bool) -> Blocks:
    """`arch` is 10 major + minor of the compute capability; `aligned`: rows begin on 16 bytes."""
    if dtype == torch.float32:
        return FLOAT32
    family = {80: 80, 90: 90, 100: 100, 103: 100}.get(arch)
    if family is None:
        return OTHER
    if not aligned:
        return UNALIGNED
    return BLOCK_TABLE[family, "small" if d <= SMALL_D else "large"]
