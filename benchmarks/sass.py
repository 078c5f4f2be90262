"""Reading the machine code of a compiled kernel: registers, spills, and what its main loop issues.

An SM has four schedulers, each of which issues one instruction of one warp a clock, and one tensor
core each (on sm_100 they work as one). The main loop is the cheapest cycle of the control flow
through a matrix instruction. Per scheduler one turn of it takes

    tensor clocks   what the tensor core needs for the turn's matrix instructions (dense rate)
    other clocks    one for each other instruction of each warp that runs the loop

and only while the second stay well below the first can the loop run at the tensor cores' rate.
"""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import triton

SCHEDULERS = 4
_INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\s*(.*?)\s*;"
)
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_FLOAT32 = re.compile(r"^(FADD|FMUL|FFMA|FMNMX|FSETP|FSET|FCHK|MUFU|F2FP?|F2I|I2FP?)\d?(\.|$)")


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its suffixes: LDGSTS.E.BYPASS.128
    operands: str = ""
    guarded: bool = False  # runs under a predicate


@dataclass
class Block:
    """Instructions without a jump into or out of their middle."""

    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Resources:
    registers: int
    stack_bytes: int
    local_bytes: int


def read_cubin(cubin: bytes) -> tuple[str, Resources]:
    """Its disassembly and resource usage, by the tools in Triton's wheel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        sass = _output(triton.knobs.nvidia.nvdisasm.path, "-c", str(path))
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
    return sass, parse_resources(usage)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def parse_resources(usage: str) -> Resources:
    """Of the text `cuobjdump --dump-resource-usage` prints for one kernel."""
    found = re.findall(r"\bREG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if len(found) != 1:
        raise ValueError(f"{len(found)} kernels in the resource usage; expected 1: {usage!r}")
    return Resources(*map(int, found[0]))


def parse_sass(sass: str) -> list[Block]:
    """Basic blocks of what `nvdisasm -c` prints, in their order."""
    blocks, labels, pending = [Block()], {}, []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
        elif match := _INSTRUCTION.search(line):
            instruction = Instruction(match[2], match[3], match[1] is not None)
            blocks[-1].instructions.append(instruction)
            targets, falls_through = _jump(instruction, line)
            if targets or not falls_through:
                pending += [(len(blocks) - 1, target) for target in targets]
                blocks.append(Block())
    for index, block in enumerate(blocks[:-1]):
        if not block.instructions or _jump(block.instructions[-1], "")[1]:
            block.successors.append(index + 1)
    for index, target in pending:
        blocks[index].successors.append(labels[target])
    return blocks


def _jump(instruction: Instruction, line: str) -> tuple[list[str], bool]:
    """Where an instruction may jump, and whether what follows it may run next."""
    kind = instruction.opcode.split(".")[0]
    if kind in ("EXIT", "RET"):
        return [], instruction.guarded
    if kind == "BRX":  # a jump table
        return re.findall(r"\.L_\w+", line), False
    if kind not in ("BRA", "JMP"):
        return [], True
    # `BRA.U UP0, (target)` and `BRA P0, (target)` are conditional as well.
    conditional = instruction.guarded or not instruction.operands.startswith("`")
    return _TARGET.findall(instruction.operands), conditional


def matrix_tensor_clocks(instruction: Instruction) -> float | None:
    """Clocks of its tensor core for one matrix instruction; None for any other instruction.

    UTCHMMA is counted by the caller: its shape is in a register.
    """
    opcode = instruction.opcode
    if opcode.startswith("HMMA.16816"):  # 2048 multiply-adds, 256 a clock of an A100's tensor core
        return 8.0
    if opcode.startswith("HMMA.1688"):  # the same in tf32: half the depth at half the rate
        return 8.0
    if opcode.startswith("HMMA.1684"):
        return 4.0
    if match := re.match(r"HGMMA\.64x(\d+)x", opcode):  # 64 n 16 at 2048 a clock of the SM
        return int(match[1]) / 2
    return 0.0 if re.match(r"UTC\w*MMA", opcode) else None


def is_matrix(instruction: Instruction) -> bool:
    return matrix_tensor_clocks(instruction) is not None


def is_ffma(instruction: Instruction) -> bool:
    """What stands for the matrix instruction where float32 products are exact."""
    return instruction.opcode.startswith("FFMA")


def main_loop(
    blocks: list[Block], wanted: Callable[[Instruction], bool] = is_matrix
) -> list[Instruction] | None:
    """One turn of the cheapest cycle through a wanted instruction; None without such a cycle."""
    costs = [sum(not wanted(i) for i in block.instructions) for block in blocks]
    best = None
    for start, block in enumerate(blocks):
        if any(map(wanted, block.instructions)):
            cycle = _cheapest_cycle(blocks, costs, start)
            if cycle and (best is None or cycle < best):
                best = cycle
    if best is None:
        return None
    return [instruction for index in best[1] for instruction in blocks[index].instructions]


def _cheapest_cycle(blocks, costs, start: int) -> tuple[int, tuple[int, ...]] | None:
    """(cost, block indices) of the cheapest way from a block back to itself: Dijkstra."""
    heap, done = [(costs[start], (start,))], set()
    while heap:
        cost, path = heapq.heappop(heap)
        if path[-1] in done:
            continue
        done.add(path[-1])
        for successor in blocks[path[-1]].successors:
            if successor == start:
                return cost, path
            if successor not in done:
                heapq.heappush(heap, (cost + costs[successor], (*path, successor)))
    return None


def float32_arithmetic(loop: list[Instruction]) -> list[str]:
    return sorted({i.opcode for i in loop if _FLOAT32.match(i.opcode)})


def tensor_clocks(loop: list[Instruction], arch: int, num_warps: int, sass: str) -> float:
    """Of one scheduler's tensor core in one turn of the loop, for all warps of a program."""
    clocks = sum(matrix_tensor_clocks(i) or 0.0 for i in loop) * max(num_warps / SCHEDULERS, 1)
    # One thread issues UTCHMMA for the whole program: M N 16 at 4096 a clock of the SM.
    shapes = [_tcgen05_shape(i, sass) for i in loop if re.match(r"UTC\w*MMA", i.opcode)]
    return clocks + sum(m * n / 256 for m, n in shapes)


def _tcgen05_shape(instruction: Instruction, sass: str) -> tuple[int, int]:
    """(M, N): bits 24-28 of the instruction descriptor in units of 16, 17-22 in units of 8."""
    register = re.search(r"idesc\[(UR\d+)\]", instruction.operands)[1]
    before = sass[: sass.index(instruction.operands)]
    descriptor = re.findall(rf"UMOV {register}, 0x([0-9a-f]+)\b", before)
    if not descriptor:
        raise ValueError(f"no constant is put into {register} before {instruction}")
    bits = int(descriptor[-1], 16)
    return (bits >> 24 & 0x1F) * 16, (bits >> 17 & 0x3F) * 8


def access_bytes(opcode: str) -> int:
    """Bytes a thread moves with one load or store."""
    match = re.search(r"\.(U8|S8|U16|S16|64|128|256)\b", opcode)
    if match is None:
        return 4
    return {"U8": 1, "S8": 1, "U16": 2, "S16": 2}.get(match[1]) or int(match[1]) // 8
