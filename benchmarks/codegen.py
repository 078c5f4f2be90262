"""Codegen gate: compile every kernel and entry of the block table and read the machine code.

    python -m benchmarks.codegen [--arch 80 90 100 gfx942] [--quick] [--jobs 2]

Needs no GPU. Each row is one kernel as the operator launches it (`benchmarks.launches`), read by
`benchmarks.sass` and held against `benchmarks.limits`. Exits with 1 when a row breaks a limit, and
names kernel, architecture, table entry and limit. What `kernels.blocks.COMPILER_BUGS` forbids at
run time is tried again; a hint says when it compiles by now. FLOPs, bytes and floor times of the
same launches: `python -m benchmarks.roofline`.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing import connection

import torch

from benchmarks.launches import Call, Launch, record
from benchmarks.limits import Kernel, Report, broken_limits, kernel_of, read
from kernels import blocks

ARCHS = (80, 89, 90, 100, "gfx942")  # 89 stands for those without an entry

# Operands that reach each part of the table: (entry, D, their type).
ENTRIES = (
    ("small", 576, torch.bfloat16),
    ("large", 4096, torch.bfloat16),
    ("unaligned", 1001, torch.bfloat16),
    ("float32", 4096, torch.float32),
)
COMPILE_LIMIT_S = 60  # then the process is killed
VOCABS = (16032, 50257)  # a multiple of 16, and not


@dataclass(frozen=True)
class Row:
    entry: str
    launch: Launch
    kernel: Kernel
    report: Report | None  # None: it does not compile
    failures: tuple[str, ...]

    @property
    def name(self) -> str:
        return (
            f"{self.launch.kernel} arch={self.kernel.arch} entry={self.entry} "
            f"[{flags(self.launch)}]"
        )


def calls(arch: int | str, quick: bool) -> list[tuple[str, Call]]:
    """(entry, call) so that every kernel, entry and combination of options is launched."""
    extras = ((False, False), (True, True)) if quick else itertools.product((False, True), repeat=2)
    results = itertools.product((False, True), repeat=2)  # entropy, cached
    vocabs = VOCABS[1:] if quick else VOCABS
    wanted = []
    for (entry, d, dtype), (bias, softcap), (entropy, cached), v in itertools.product(
        ENTRIES, extras, results, vocabs
    ):
        options = {"bias": bias, "softcap": softcap, "entropy": entropy, "cached": cached}
        wanted.append((entry, Call(arch=arch, d=d, v=v, dtype=dtype, **options)))
    return wanted if quick else wanted + _other_operands(arch)


def _other_operands(arch: int | str) -> list[tuple[str, Call]]:
    """float16, mixed types, and a D that is no multiple of the tile's depth."""
    wanted = []
    for entry, d in (("small", 576), ("large", 4096)):
        for options in ({"cached": True}, {"cached": True, "bias": True, "softcap": True}, {}):
            call = Call(arch=arch, d=d, **options)
            wanted += [
                (entry, replace(call, dtype=torch.float16)),
                (entry, replace(call, d=d + 8)),
                ("float32", replace(call, dtype=torch.float32, weight_dtype=torch.bfloat16)),
            ]
    return wanted


def launches(arch: int | str, quick: bool) -> list[tuple[str, Launch]]:
    """Every different machine code that the calls run."""
    found = {}
    for entry, call in calls(arch, quick):
        for launch in record(call)[0]:
            found.setdefault((entry, launch.key()), (entry, launch))
    return list(found.values())


def flags(launch: Launch) -> str:
    """What distinguishes a launch within its entry."""
    names = ("hidden", "weight", "e_ptr", "dz_ptr")
    types = [re.search(r"bf16|fp16|fp32", launch.signature.get(name, "")) for name in names]
    on = [name.lower() for name, value in launch.constexprs.items() if value is True]
    return " ".join([*dict.fromkeys(t[0] for t in types if t), *on])


def examine(tasks: list[tuple[str, Launch]], jobs: int) -> Iterator[Row]:
    """Rows in the order of tasks. Each compiles in a process of its own: the compiler may crash."""
    context = multiprocessing.get_context("fork")
    running, done, started = {}, {}, 0
    for index, (entry, launch) in enumerate(tasks):
        while index not in done:
            while started < len(tasks) and len(running) < jobs:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_examine_one, args=(tasks[started][1], sender))
                process.start()
                sender.close()
                running[receiver] = (started, process)
                started += 1
            for receiver in connection.wait(list(running)):
                finished, process = running.pop(receiver)
                done[finished] = _result(receiver, process)
        report, failures = done.pop(index)
        yield Row(entry, launch, kernel_of(launch), report, tuple(failures))


def _result(receiver: connection.Connection, process) -> tuple[Report | None, list[str]]:
    try:
        result = receiver.recv()
    except EOFError:
        result = None
    process.join()
    return result or (None, [f"the compiler crashed (exit {process.exitcode})"])


def _examine_one(launch: Launch, sender: connection.Connection) -> None:
    signal.alarm(COMPILE_LIMIT_S)
    # The compiler prints whole modules when a pass fails.
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    try:
        compiled = launch.compile()
    except Exception as error:  # the boundary to the compiler: any failure is a row of the table
        sender.send((None, [f"does not compile: {_first_line(error)}"]))
        return
    kernel = kernel_of(launch)
    report = read(kernel, compiled)
    sender.send((report, broken_limits(kernel, report)))


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if "fatal" in line or "error:" in line]
    return f"{type(error).__name__}: {(lines or str(error).splitlines() or [''])[0].strip()}"


def forbidden(bugs) -> list[tuple[str, Launch]]:
    """(bug's name, the launch that it forbids: the small entry with the bug's constants)."""
    found = []
    for bug in bugs:
        call = Call(arch=bug.arch, d=576, cached="fwd" in bug.kernel)
        launch = next(x for x in record(call)[0] if x.kernel == bug.kernel)
        names = list(launch.signature)
        changed = {(names.index(name),): value for name, value in bug.constants.items()}
        found.append((bug.name, replace(launch, constants=launch.constants | changed)))
    return found


HEADER = (
    f"{'kernel':28} {'arch':6} {'entry':9} {'reg':>3} {'spill':>5} {'smem KiB':>8} {'tmem':>4} "
    f"{'matrix':24} {'other/tensor':>12} {'load':>4} {'store':>5} {'SM':>2} {'occ':>4}  flags"
)


def line(row: Row) -> str:
    """A row of the table: widths in bytes, `SM` programs on one, `occ` warps of those it holds."""
    start = f"{row.launch.kernel:28} {row.kernel.arch!s:6} {row.entry:9} "
    seen = row.report
    if seen is None:
        return f"{start}{row.failures[0]}  {flags(row.launch)}"
    if row.kernel.arch == "gfx942":  # more is not read there
        return (
            f"{start}{seen.registers:3} {seen.spills:5} {seen.shared_bytes / 1024:8.0f} "
            f"{'-':>4} {seen.matrix or '-':54}  {flags(row.launch)}"
        )
    load = "TMA" if seen.by_tma and not seen.load_bytes else seen.load_bytes or "-"
    store = "-" if not row.kernel.tile_bytes else 16 if seen.wide_store_bytes else "<16"
    return (
        f"{start}{seen.registers:3} {seen.spills:5} {seen.shared_bytes / 1024:8.0f} "
        f"{seen.tensor_columns:4} {seen.matrix or '-':24} {seen.other_share:12.3f} {load:>4} "
        f"{store:>5} {seen.programs_per_sm:2} {seen.occupancy:4.0%}  {flags(row.launch)}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=ARCHS, choices=[str(a) for a in ARCHS])
    parser.add_argument("--quick", action="store_true", help="fewer combinations of options")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    begin = time.monotonic()
    archs = [int(arch) if str(arch).isdigit() else arch for arch in args.arch]
    tasks = [task for arch in archs for task in launches(arch, args.quick)]
    print(HEADER)
    broken = []
    for row in examine(tasks, args.jobs):
        print(line(row), flush=True)
        broken += [f"{row.name}: {failure}" for failure in row.failures]
    bugs = [bug for bug in blocks.COMPILER_BUGS if bug.arch in archs]
    for row in examine(forbidden(bugs), args.jobs):
        print(f"still fails: {row.entry}" if row.failures else f"NOW COMPILES: {row.entry}")
    print(f"\n{len(tasks)} kernels in {time.monotonic() - begin:.0f} s")
    for failure in broken:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
