"""Roofline sheet: what each launch computes and moves, and the least time each GPU needs for it.

    python -m benchmarks.roofline [--shape llama8b ...] [--device H100 ...]

Counted from the grid and the tile sizes of the recorded launches (`benchmarks.launches`), no GPU
needed; none of it is measured. The floor of a launch is the larger of FLOPs / dense bfloat16 rate
and DRAM bytes / bandwidth. `useful` is 2NDV / FLOPs: the rest is tiles past the edge.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.contenders import SHAPES
from benchmarks.launches import Call, Launch, record
from benchmarks.limits import kernel_of, read

ITEM_BYTES = {"*bf16": 2, "*fp16": 2, "*fp32": 4, "*i64": 8, "*i32": 4}
DEFAULT_SHAPES = ("llama8b", "llama70b-tp8", "qwen7b", "smollm2")


@dataclass(frozen=True, kw_only=True)
class Device:
    arch: int
    num_sms: int
    flops: float  # dense bfloat16 FLOP/s
    bandwidth: float  # DRAM bytes/s
    source: str


DEVICES = {
    "A100": Device(
        arch=80, num_sms=108, flops=312e12, bandwidth=2.039e12,
        source="NVIDIA A100 datasheet, SXM4 80 GB",
    ),
    "H100": Device(
        arch=90, num_sms=132, flops=989e12, bandwidth=3.35e12,
        source="NVIDIA H100 datasheet, SXM5 80 GB, without sparsity",
    ),
    "H200": Device(
        arch=90, num_sms=132, flops=989e12, bandwidth=4.8e12,
        source="NVIDIA H200 datasheet, SXM, without sparsity",
    ),
    "B200": Device(
        arch=100, num_sms=148, flops=2250e12, bandwidth=8e12,
        source="NVIDIA HGX B200 datasheet, one of its 8 GPUs, without sparsity",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Work:
    """One launch. `dram_bytes`: each output once, hidden once, weight once for each panel of
    hidden's rows (which stays in the L2 cache meanwhile)."""

    flops: int
    useful_flops: int
    dram_bytes: int
    floor_bytes: int  # each input and output once
    tile_bytes: int  # operands that programs load, mostly from the L2 cache

    @property
    def intensity(self) -> float:
        return self.flops / self.dram_bytes

    def floor_s(self, device: Device) -> float:
        return max(self.flops / device.flops, self.dram_bytes / device.bandwidth)


def work(launch: Launch) -> Work:
    if "BLOCK_D" in launch.constexprs:
        return _gemm_work(launch)
    sizes, types = launch.scalars, launch.signature
    n = sizes["N"]
    if "num_slices" in sizes:  # the statistics' merge
        rows = 3 if launch.constexprs["WITH_ENTROPY"] else 2  # statistics of a slice
        moved = 4 * n * (rows * sizes["num_slices"] + rows)
    else:  # E is read and dz written in its place
        # Anchors of each slice, and a label and three factors of each row.
        moved = n * sizes["V"] * 2 * ITEM_BYTES[types["e_ptr"]]
        moved += 4 * n * -(-sizes["V"] // launch.constexprs["WIDTH"]) + n * (8 + 3 * 4)
    return Work(flops=0, useful_flops=0, dram_bytes=moved, floor_bytes=moved, tile_bytes=0)


def _gemm_work(launch: Launch) -> Work:
    constants, types = launch.constexprs, launch.signature
    n, d, v = (launch.scalars[name] for name in ("N", "D", "V"))
    block_n, block_v, block_d = (constants[f"BLOCK_{x}"] for x in "NVD")
    blocks_n, blocks_v, blocks_d = (-(-n // block_n), -(-v // block_v), -(-d // block_d))
    tiles = blocks_n * blocks_v
    item_h, item_w = (_item_bytes(types[name]) for name in ("hidden", "weight"))
    panels = -(-blocks_n // launch.scalars["panel_blocks"])
    outputs = _output_bytes(launch, n, v, blocks_v * constants["SLICES"])
    return Work(
        flops=2 * tiles * block_n * block_v * blocks_d * block_d,
        useful_flops=2 * n * d * v,
        dram_bytes=n * d * item_h + panels * v * d * item_w + outputs,
        floor_bytes=n * d * item_h + v * d * item_w + outputs,
        tile_bytes=tiles * blocks_d * block_d * (block_n * item_h + block_v * item_w),
    )


def _item_bytes(kind: str) -> int:
    """Of a pointer's or a tensor descriptor's element."""
    return ITEM_BYTES["*" + kind.removeprefix("tensordesc<").removeprefix("*").split("[")[0]]


def _output_bytes(launch: Launch, n: int, v: int, num_slices: int) -> int:
    types, constants = launch.signature, launch.constexprs
    if "dz_ptr" in types:  # padded to whole tiles
        return (
            n * -(-v // constants["BLOCK_V"]) * constants["BLOCK_V"] * _item_bytes(types["dz_ptr"])
        )
    statistics = 4 * n * num_slices * (3 if constants["WITH_ENTROPY"] else 2) + 4 * n
    if not constants["STORE_E"]:
        return statistics
    return statistics + n * launch.scalars["num_cached"] * _item_bytes(types["e_ptr"])


def modes(n: int, d: int, v: int, device: Device) -> Iterator[tuple[str, list[Launch], int]]:
    """(mode, launches, FLOPs of the library's GEMMs)."""
    for mode in ("strict", "cached"):
        call = Call(
            arch=device.arch, n=n, d=d, v=v, cached=mode == "cached", num_sms=device.num_sms
        )
        yield mode, *record(call)


def sheet(shape: str, name: str, shares: dict[str, float]) -> list[str]:
    """Lines for one shape and GPU. `shares` keeps what was read from machine code already."""
    device, (n, d, v) = DEVICES[name], SHAPES[shape]
    ndv = n * d * v
    lines = [
        f"{name} {shape} N={n} D={d} V={v}: {device.flops / 1e12:.0f} TFLOP/s, "
        f"{device.bandwidth / 1e12:.2f} TB/s ({device.source})",
        f"  {'mode':7} {'launch':28} {'programs':>8} {'TFLOP':>7} {'useful':>6} {'GB':>7} "
        f"{'least GB':>8} {'tiles GB':>8} {'FLOP/B':>7} {'floor ms':>8} {'other/tensor':>12}",
    ]
    for mode, launches, library_flops in modes(n, d, v, device):
        floor_s = library_flops / device.flops
        total = library_flops
        for launch, count in _merged(launches):
            done = work(launch)
            total += done.flops * count
            floor_s += done.floor_s(device) * count
            lines.append(_line(mode, launch, count, done, device, shares))
        lines.append(
            f"  {mode:7} {'library GEMMs of backward':28} {'':8} {library_flops / 1e12:7.2f}"
            f"{'':33}{'':8} {library_flops / device.flops * 1e3:8.3f}"
        )
        lines.append(
            f"  {mode:7} forward + backward: {total / ndv:.2f} NDV FLOPs, floor {floor_s * 1e3:.3f}"
            f" ms; 6 NDV at full rate {6 * ndv / device.flops * 1e3:.3f} ms"
        )
    return lines


def _merged(launches: list[Launch]) -> list[tuple[Launch, int]]:
    """Equal launches once, with their number."""
    found: dict[tuple, list] = {}
    for launch in launches:
        entry = found.setdefault((launch.key(), launch.grid, work(launch)), [launch, 0])
        entry[1] += 1
    return [(launch, count) for launch, count in found.values()]


def _line(mode, launch: Launch, count: int, done: Work, device: Device, shares) -> str:
    name = launch.kernel + (f" x{count}" if count > 1 else "")
    useful = f"{done.useful_flops / done.flops:6.1%}" if done.flops else f"{'-':>6}"
    other = _other_share(launch, shares)
    share = "-" if math.isnan(other) else f"{other:.3f}"
    return (
        f"  {mode:7} {name:28} {launch.grid:8} {done.flops * count / 1e12:7.2f} {useful} "
        f"{done.dram_bytes * count / 1e9:7.3f} {done.floor_bytes * count / 1e9:8.3f} "
        f"{done.tile_bytes * count / 1e9:8.1f} {done.intensity:7.0f} "
        f"{done.floor_s(device) * count * 1e3:8.3f} {share:>12}"
    )


def _other_share(launch: Launch, shares: dict[str, float]) -> float:
    """Issue clocks that are not the tensor cores', as a share of theirs, in the main loop."""
    key = launch.key()
    if key not in shares:
        shares[key] = read(kernel_of(launch), launch.compile()).other_share
    return shares[key]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--shape", nargs="+", default=DEFAULT_SHAPES, choices=list(SHAPES))
    parser.add_argument("--device", nargs="+", default=list(DEVICES), choices=list(DEVICES))
    args = parser.parse_args(argv)
    shares: dict[str, float] = {}
    for shape in args.shape:
        for name in args.device:
            print(*sheet(shape, name, shares), "", sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
