"""Tile sizes of the Triton kernels by architecture, hidden size and operand type.

Ranked by reading the machine code of each entry (`python -m benchmarks.codegen`), not by timing.
Static: tuning while training would stall ranks that wait for each other, and N changes every step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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


# By architecture and kind, for 16-bit operands with aligned rows. Four slices: a smaller epilogue
# spills no registers.
_WIDE = Blocks(block_v=256, slices=4, descriptors=True)
_DEEP = Blocks(block_d=128, num_stages=3, slices=4, descriptors=True)
BLOCK_TABLE = {
    (80, "small"): Blocks(slices=4),
    (80, "large"): Blocks(block_v=256, slices=4),
    (80, "lean"): Blocks(slices=4),
    (90, "small"): _WIDE,
    (90, "large"): _WIDE,
    (90, "lean"): _DEEP,
    (100, "small"): Blocks(descriptors=True, flatten=True, warp_specialize=True),
    (100, "large"): _WIDE,
    # Without maxnreg the assembler stops at 168 registers, and spills.
    (100, "lean"): replace(_DEEP, num_warps=4, maxnreg=255),
}
SMALL_D = 1024  # up to here the epilogue weighs more than the GEMM's tile
UNALIGNED = Blocks(num_stages=3, slices=4)  # rows do not begin on 16 bytes
UNALIGNED_LEAN = Blocks(block_v=64, num_stages=3, slices=2)
FLOAT32 = Blocks(block_n=64, block_v=64, block_d=16, num_warps=4, num_stages=3, slices=4)
OTHER = Blocks(block_d=32, num_stages=3, slices=4)  # no entry: at most 48 KiB of shared memory
OTHER_LEAN = Blocks(block_v=64, block_d=32, num_stages=3, slices=2)


@dataclass(frozen=True, kw_only=True)
class CompilerBug:
    """Constants of a kernel at which Triton's compiler fails; the launcher refuses them, and
    `python -m benchmarks.codegen` tries them again."""

    name: str
    arch: int
    kernel: str
    constants: dict[str, object]


COMPILER_BUGS = tuple(
    CompilerBug(name=f"triton 3.7.1, sm_100: {what}", arch=100, kernel=kernel, constants=constants)
    for kernel in ("linear_logprob_fwd_kernel", "linear_logprob_bwd_kernel")
    for what, constants in (
        ("warp_specialize with 2 slices", {"WARP_SPECIALIZE": True, "SLICES": 2}),
        ("warp_specialize with 4 slices", {"WARP_SPECIALIZE": True, "SLICES": 4}),
        (
            "warp_specialize with bias and softcap",
            {"WARP_SPECIALIZE": True, "HAS_BIAS": True, "HAS_SOFTCAP": True},
        ),
    )
)


def blocks_for(arch: int, d: int, dtype: torch.dtype, row_multiple: int, softcap: bool) -> Blocks:
    """`arch` is 10 major + minor of the compute capability. Rows of both operands begin at
    multiples of `row_multiple` elements: descriptors need 8, Triton's 16-byte loads 16."""
    if dtype == torch.float32:
        return FLOAT32
    # The softcap's slope, and float16's float32 E and dz, take registers that large tiles lack.
    is_lean = softcap or dtype == torch.float16
    kind = "lean" if is_lean else "small" if d <= SMALL_D else "large"
    blocks = BLOCK_TABLE.get((_family(arch), kind))
    if blocks is None:
        return OTHER_LEAN if is_lean else OTHER
    if row_multiple % (8 if blocks.descriptors else 16) == 0:
        return blocks
    return UNALIGNED_LEAN if is_lean else UNALIGNED


def _family(arch: int) -> int:
    return 100 if arch == 103 else arch  # B300 runs what B200 runs


def check_compiler_bugs(arch: int, constants: dict[str, object]) -> None:
    for bug in COMPILER_BUGS:
        if _family(arch) == bug.arch and bug.constants.items() <= constants.items():
            raise NotImplementedError(f"{bug.name} does not compile; use impl='torch'")
