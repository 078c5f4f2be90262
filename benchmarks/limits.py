"""What the machine code of one kernel must not exceed, and which of it a kernel breaks.

Sources of the hardware numbers: NVIDIA's CUDA C++ Programming Guide, table "Technical
Specifications per Compute Capability", and the Blackwell tuning guide (tensor memory).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from benchmarks import sass
from benchmarks.launches import Launch

KIB = 1024
MATRIX = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
SHARED_PER_PROGRAM = {80: 163 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB}
SHARED_PER_SM = {80: 164 * KIB, 89: 100 * KIB, 90: 228 * KIB, 100: 228 * KIB}
SHARED_RESERVED = KIB  # for each program on an SM
WARPS_PER_SM = {80: 64, 89: 48, 90: 64, 100: 64}
REGISTERS_PER_SM = 65536
TENSOR_COLUMNS = 512
OTHER_SHARE = {80: 0.25, 90: 0.25, 100: 0.35}  # other issue clocks / tensor-core clocks
WIDE = 16  # bytes of one load or store
MFMA_SHARED = 64 * KIB


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What a launch says about the machine code it should become."""

    arch: int | str
    kind: str  # "tensor", "float32" (no tensor cores: ieee) or "elementwise"
    num_warps: int
    block_v: int
    tile_bytes: int  # what a program writes of an (N, V) tensor; 0: it writes none
    aligned: bool  # rows of the operands begin on 16 bytes


@dataclass(frozen=True, kw_only=True)
class Report:
    """One compiled kernel. Clocks are of one scheduler and one turn of the main loop."""

    registers: int  # of a thread
    spills: int  # loads and stores of local memory
    stack_bytes: int
    shared_bytes: int
    tensor_columns: int
    matrix: str | None  # the main loop's matrix instruction
    all_matrix: tuple[str, ...]  # every kind of matrix instruction in the kernel
    tensor_clocks: float
    other_clocks: float
    loop_arithmetic: tuple[str, ...]  # float32 instructions in the main loop
    load_bytes: int | None  # narrowest load of the operands; None: none but by TMA
    by_tma: bool
    wide_load_bytes: int  # what a program reads 16 bytes at a time
    wide_store_bytes: int
    programs_per_sm: int
    occupancy: float  # of the warps that an SM can hold

    @property
    def other_share(self) -> float:
        return self.other_clocks / self.tensor_clocks if self.tensor_clocks else float("nan")


def kernel_of(launch: Launch) -> Kernel:
    constants, types = launch.constexprs, launch.signature
    gemm = "BLOCK_D" in constants
    operands = [str(types.get(name, "")) for name in ("hidden", "weight")]
    kind = "float32" if gemm and "fp32" in operands[0] else "tensor" if gemm else "elementwise"
    output = types.get("dz_ptr") or (types.get("e_ptr") if constants.get("STORE_E", True) else None)
    width = constants.get("BLOCK_V", constants.get("WIDTH", 0))
    strides = [i for i, name in enumerate(types) if name in ("stride_hn", "stride_wv")]
    return Kernel(
        arch=launch.target.arch,
        kind=kind,
        num_warps=launch.options["num_warps"],
        block_v=width,
        tile_bytes=constants["BLOCK_N"] * width * (4 if output == "*fp32" else 2) if output else 0,
        aligned=all(launch.attributes.get((i,)) for i in strides),
    )


def read(kernel: Kernel, compiled) -> Report:
    metadata = compiled.metadata
    if "amdgcn" in compiled.asm:
        return amd_report(compiled.asm["amdgcn"], metadata.shared)
    text, resources = sass.read_cubin(compiled.asm["cubin"])
    return report(
        kernel,
        text,
        resources,
        total_warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        tensor_columns=metadata.tmem_size,
    )


def report(
    kernel: Kernel,
    text: str,
    resources: sass.Resources,
    *,
    total_warps: int,
    shared_bytes: int,
    tensor_columns: int = 0,
) -> Report:
    """`total_warps` exceeds the kernel's own when the compiler gave loads and MMAs extra warps."""
    blocks = sass.parse_sass(text)
    everything = [i for block in blocks for i in block.instructions]
    wanted = sass.is_ffma if kernel.kind == "float32" else sass.is_matrix
    loop = [] if kernel.kind == "elementwise" else sass.main_loop(blocks, wanted) or []
    # Then a single warp runs the loop with the MMAs.
    loop_warps = 1 if total_warps > kernel.num_warps else kernel.num_warps
    other = sum(not wanted(i) for i in loop) * max(loop_warps / sass.SCHEDULERS, 1)
    matrix = [i.opcode for i in loop if wanted(i)]
    programs = _programs_per_sm(
        kernel.arch, resources.registers, total_warps, shared_bytes, tensor_columns
    )
    loads = [i for i in everything if i.opcode.startswith("LDGSTS")]
    loads += [i for i in loop if i.opcode.startswith("LDG.")]
    return Report(
        registers=resources.registers,
        spills=sum(bool(re.match(r"(LDL|STL)\b", i.opcode)) for i in everything),
        stack_bytes=resources.stack_bytes + resources.local_bytes,
        shared_bytes=shared_bytes,
        tensor_columns=tensor_columns,
        matrix=matrix[0] if matrix else None,
        all_matrix=tuple(sorted({i.opcode for i in everything if sass.is_matrix(i)})),
        tensor_clocks=sass.tensor_clocks(loop, kernel.arch, loop_warps, text),
        other_clocks=other,
        loop_arithmetic=tuple(sass.float32_arithmetic(loop)),
        load_bytes=min((sass.access_bytes(i.opcode) for i in loads), default=None),
        by_tma=any(i.opcode.startswith("UTMALDG") for i in everything),
        wide_load_bytes=_wide_bytes(everything, "LDG.", kernel.num_warps),
        wide_store_bytes=_wide_bytes(everything, "STG.", kernel.num_warps),
        programs_per_sm=programs,
        occupancy=programs * total_warps / WARPS_PER_SM[kernel.arch],
    )


def _wide_bytes(instructions: list[sass.Instruction], opcode: str, num_warps: int) -> int:
    widths = [sass.access_bytes(i.opcode) for i in instructions if i.opcode.startswith(opcode)]
    return sum(width for width in widths if width >= WIDE) * 32 * num_warps


def _programs_per_sm(arch: int, registers: int, num_warps: int, shared: int, columns: int) -> int:
    per_warp = -(-registers * 32 // 256) * 256  # given out in units of 256
    limits = [
        REGISTERS_PER_SM // (per_warp * num_warps),
        SHARED_PER_SM[arch] // (shared + SHARED_RESERVED),
        WARPS_PER_SM[arch] // num_warps,
    ]
    return min([*limits, TENSOR_COLUMNS // columns] if columns else limits)


def amd_report(text: str, shared_bytes: int) -> Report:
    """Counts from the metadata of the assembly; its main loop is not read."""
    count = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # noqa: E731
    matrix = sorted(set(re.findall(r"\bv_mfma\w+", text)))
    return Report(
        registers=count("vgpr_count"),
        spills=count("vgpr_spill_count") + count("sgpr_spill_count"),
        stack_bytes=count("private_segment_fixed_size"),
        shared_bytes=shared_bytes,
        tensor_columns=0,
        matrix=matrix[0] if matrix else None,
        all_matrix=tuple(matrix),
        tensor_clocks=0,
        other_clocks=0,
        loop_arithmetic=(),
        load_bytes=None,
        by_tma=False,
        wide_load_bytes=0,
        wide_store_bytes=0,
        programs_per_sm=0,
        occupancy=float("nan"),
    )


def broken_limits(kernel: Kernel, seen: Report) -> list[str]:
    """What is wrong, each with the number and its limit; empty when nothing is."""
    if kernel.arch == "gfx942":
        return _broken_amd(kernel, seen)
    found = []
    if seen.spills or seen.stack_bytes:
        found.append(f"spills: {seen.spills} instructions, {seen.stack_bytes} bytes of stack > 0")
    shared = SHARED_PER_PROGRAM[kernel.arch]
    if seen.shared_bytes > shared:
        found.append(f"shared memory: {seen.shared_bytes} bytes > {shared}")
    if seen.tensor_columns > TENSOR_COLUMNS:
        found.append(f"tensor memory: {seen.tensor_columns} columns > {TENSOR_COLUMNS}")
    if seen.programs_per_sm < 1:
        found.append("occupancy: not one program fits an SM")
    if seen.wide_store_bytes < kernel.tile_bytes:
        found.append(
            f"stores: {seen.wide_store_bytes} of a tile's {kernel.tile_bytes} bytes are written "
            f"{WIDE} bytes at a time"
        )
    if kernel.kind == "elementwise":
        if seen.wide_load_bytes < kernel.tile_bytes:
            found.append(f"loads: {seen.wide_load_bytes} < {kernel.tile_bytes} bytes are wide")
        return found
    return found + _broken_in_loop(kernel, seen)


def _broken_in_loop(kernel: Kernel, seen: Report) -> list[str]:
    found = []
    if kernel.kind == "float32":
        if seen.matrix is None or seen.all_matrix:
            found.append(f"matrix instruction: {seen.all_matrix or None}; expected FFMA alone")
    else:
        found += _broken_matrix(kernel, seen)
    if kernel.aligned and not (seen.by_tma or (seen.load_bytes or 0) >= WIDE):
        found.append(f"loads: {seen.load_bytes} bytes; expected {WIDE} or TMA")
    return found


def _broken_matrix(kernel: Kernel, seen: Report) -> list[str]:
    expected = MATRIX[kernel.arch]
    if expected == "HGMMA":
        expected = f"HGMMA.64x{kernel.block_v}x16"
    wrong = [name for name in seen.all_matrix if not name.startswith(expected)]
    if seen.matrix is None or wrong:
        return [f"matrix instruction: {wrong or None} in the main loop; expected {expected}"]
    found = []
    if seen.loop_arithmetic:
        found.append(f"float32 arithmetic in the main loop: {', '.join(seen.loop_arithmetic)}")
    limit = OTHER_SHARE.get(kernel.arch)
    if kernel.aligned and limit and seen.other_share > limit:
        found.append(f"other issue clocks / tensor-core clocks: {seen.other_share:.3f} > {limit}")
    return found


def _broken_amd(kernel: Kernel, seen: Report) -> list[str]:
    found = []
    if seen.spills:
        found.append(f"spills: {seen.spills} registers > 0")
    if seen.shared_bytes > MFMA_SHARED:
        found.append(f"shared memory: {seen.shared_bytes} bytes > {MFMA_SHARED}")
    if kernel.kind == "tensor" and seen.matrix is None:
        found.append("matrix instruction: none; expected v_mfma")
    return found
