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


# (arch, hidden size class, softcap) for 16-bit operands with aligned rows. Four slices: a smaller
# epilogue spills no registers. The softcap's slope needs more of them, hence tiles of its own.
_SOFTCAP_90 = Blocks(block_d=128, num_stages=3, slices=4, descriptors=True)
_SOFTCAP_100 = replace(_SOFTCAP_90, num_warps=4, maxnreg=255)  # without maxnreg: 168, and spills
_WIDE = Blocks(block_v=256, slices=4, descriptors=True)
BLOCK_TABLE = {
    (80, "small", False): Blocks(slices=4),
    (80, "large", False): Blocks(block_v=256, slices=4),
    (80, "small", True): Blocks(slices=4),
    (80, "large", True): Blocks(slices=4),
    (90, "small", False): _WIDE,
    (90, "large", False): _WIDE,
    (90, "small", True): _SOFTCAP_90,
    (90, "large", True): _SOFTCAP_90,
    (100, "small", False): Blocks(descriptors=True, flatten=True, warp_specialize=True),
    (100, "large", False): _WIDE,
    (100, "small", True): _SOFTCAP_100,
    (100, "large", True): _SOFTCAP_100,
}
SMALL_D = 1024  # up to here the epilogue weighs more than the GEMM's tile
UNALIGNED = Blocks(num_stages=3, slices=4)  # rows do not begin on 16 bytes
UNALIGNED_SOFTCAP = Blocks(block_v=64, num_stages=3, slices=2)
FLOAT32 = Blocks(block_n=64, block_v=64, block_d=16, num_warps=4, num_stages=3, slices=4)
OTHER = Blocks(block_d=32, num_stages=3, slices=4)  # no entry: at most 48 KiB of shared memory


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
    family = {80: 80, 90: 90, 100: 100, 103: 100}.get(arch)
    if family is None:
        return OTHER
    blocks = BLOCK_TABLE[family, "small" if d <= SMALL_D else "large", softcap]
    if row_multiple % (8 if blocks.descriptors else 16) == 0:
        return blocks
    return UNALIGNED_SOFTCAP if softcap else UNALIGNED


def check_compiler_bugs(arch: int, constants: dict[str, object]) -> None:
    for bug in COMPILER_BUGS:
        if arch == bug.arch and bug.constants.items() <= constants.items():
            raise NotImplementedError(f"{bug.name} does not compile; use impl='torch'")
