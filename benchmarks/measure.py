"""Time and memory of contenders, the machine they ran on, and the file of raw rows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import Contender, Inputs

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's, else lines on stderr
RESULTS = Path(__file__).parent / "results"
PASSES = ("forward", "backward", "both")


def train_step(contender: Contender, inputs: Inputs, stamp: Callable[[], object] = lambda: None):
    """One forward with gradient and one backward: (log-probs, dhidden, dweight, stamps)."""
    start = stamp()
    logps = contender.forward(inputs)
    middle = stamp()
    dhidden, dweight = contender.backward(inputs, logps)
    return logps, dhidden, dweight, (start, middle, stamp())


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What one untimed run of each pass told; it is the warm-up as well."""

    extra_bytes: dict[str, int]  # most that lived at once beside inputs and results, by pass
    round_s: float  # rough


def probe(contender: Contender, inputs: Inputs) -> tuple[tuple[Tensor, Tensor, Tensor], Probe]:
    """((log-probs, dhidden, dweight), what was seen)."""
    cuda = inputs.hidden.is_cuda
    peak = _cuda_peak_bytes if cuda else _cpu_peak_bytes

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (contender.forward(inputs),)

    def both() -> tuple[Tensor, ...]:
        return train_step(contender, inputs)[:3]

    if cuda:  # compiles; its memory and time are not the operator's
        forward(), both()
    extra, start = {}, time.perf_counter()
    for name, fn in (("forward", forward), ("both", both)):
        most, results = peak(fn)
        # The bare GEMMs write into buffers that exist already.
        extra[name] = 0 if contender.bare else most - sum(t.nbytes for t in results)
    round_s = time.perf_counter() - start
    logps, dhidden, dweight = results
    return (logps.detach(), dhidden, dweight), Probe(extra_bytes=extra, round_s=round_s)


def time_interleaved(
    contenders: list[Contender], inputs: Inputs, rounds: dict[str, int]
) -> dict[str, dict[str, list[float]]]:
    """Seconds by contender and pass; every round runs each contender once, in turn, those with
    fewer `rounds` only in the first ones.

    forward is without gradient (the reference sweep); backward and both come from one training
    step.
    """
    clock = _CudaClock() if inputs.hidden.is_cuda else _CpuClock()
    samples = {c.name: {p: [] for p in PASSES} for c in contenders}
    for index in range(max(rounds.values())):
        for contender in contenders:
            if index < rounds[contender.name]:
                for name, seconds in _one_round(contender, inputs, clock).items():
                    samples[contender.name][name].append(seconds)
    return samples


def take_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call by way; every round calls each once. For work on a CPU."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            samples[name].append(time.perf_counter() - start)
    return samples


def rounds_within(budget_s: float, seconds: float, repeats: int) -> int:
    return min(repeats, max(1, int(budget_s / seconds)))


def _one_round(contender: Contender, inputs: Inputs, clock) -> dict[str, float]:
    clock.prepare()
    with torch.no_grad():
        start = clock.stamp()
        contender.forward(inputs)
        forward_s = clock.seconds(start, clock.stamp())
    clock.prepare()
    start, middle, end = train_step(contender, inputs, clock.stamp)[-1]
    return {
        "forward": forward_s,
        "backward": clock.seconds(middle, end),
        "both": clock.seconds(start, end),
    }


class _CpuClock:
    def prepare(self) -> None:
        pass

    def stamp(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class _CudaClock:
    def __init__(self):
        self.buffer = torch.empty(2**30, dtype=torch.uint8, device="cuda")

    def prepare(self) -> None:
        # Empties L2 and keeps the device busy while the host queues the first kernels.
        torch.cuda.synchronize()
        self.buffer.zero_()

    def stamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def statistics(samples: list[float]) -> dict[str, float]:
    p20, median, p80 = np.percentile(samples, [20, 50, 80])
    return {
        "median_s": float(median),
        "p20_s": float(p20),
        "p80_s": float(p80),
        "min_s": min(samples),
        "repeats": len(samples),
    }


def _cpu_peak_bytes(fn: Callable[[], tuple[Tensor, ...]]) -> tuple[int, tuple[Tensor, ...]]:
    live, results = live_bytes(fn)
    return max(live, default=0), results


def live_bytes(fn: Callable[[], Any]) -> tuple[list[int], Any]:
    """Bytes of tensors that `fn` made, after each event of the CPU's allocator, and its result,
    which is still there after the last."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = fn()
    events = trace.profiler.kineto_results.events()
    live = accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    return list(live), result


def _cuda_peak_bytes(fn: Callable[[], tuple[Tensor, ...]]) -> tuple[int, tuple[Tensor, ...]]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, results


def cpu_flags() -> dict[str, bool]:
    """The CPU's bfloat16 units."""
    has = torch.cpu.get_capabilities()
    amx = bool(has.get("amx_tile") and has.get("amx_bf16"))
    return {"amx": amx, "avx512_bf16": bool(has.get("avx512_bf16"))}


def cpu_gemm_rates(inputs: Inputs) -> dict[str, float]:
    """TFLOP/s of the forward GEMM (best of 4): float32, bfloat16, and float32 that torch may run
    on the bfloat16 units."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()[:8192]
    matmul, rates = torch.backends.mkldnn.matmul, {}
    saved = matmul.fp32_precision
    kinds = [
        ("float32", torch.float32, "ieee"),
        ("bfloat16", torch.bfloat16, "ieee"),
        ("float32 at fp32_precision='bf16'", torch.float32, "bf16"),
    ]
    for name, dtype, precision in kinds * 4:
        a, b = hidden.to(dtype), weight.to(dtype).T
        matmul.fp32_precision = precision
        start = time.perf_counter()
        torch.mm(a, b)
        rate = 2 * a.numel() * b.shape[1] / (time.perf_counter() - start) / 1e12
        matmul.fp32_precision = saved
        rates[name] = max(rates.get(name, 0), rate)
    return rates


def default_device() -> str:
    """Where train.py runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine(device: str) -> dict[str, object]:
    """What every row says about where and when it was measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_flags": cpu_flags(),
    }


def _commit() -> str:
    def git(*args: str) -> str:
        command = ["git", "--no-optional-locks", *args]
        done = subprocess.run(
            command, cwd=RESULTS.parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    # Rows of earlier runs in benchmarks/results do not make the code another one.
    changed = git("status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("-dirty" if changed else "")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    names = re.findall(r"^model name\s*:\s*(.+)$", text, re.M)
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores"


def slug(device: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def append_rows(directory: Path, rows: list[dict]) -> Path:
    """One JSON line a row, into the machine's file."""
    path = directory / f"{slug(str(rows[0]['device']))}.jsonl"
    directory.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
