"""How fast rows become token ids and packed batches, and what memory that takes.

    python -m benchmarks.data_speed [--data FILE.jsonl[.gz] --tokenizer FOLDER] [--rows 100000]

The rows of FILE again and again, each with its number at the end of its chosen response so that no
two are alike; without a file made-up ones as long as short instructions (rows of messages). Each
measurement is a process of its own with empty caches, bound to as many CPUs as it has workers:
rows -> checked pairs -> template -> ids -> arrays and report, first with 1 worker, then with all,
at several numbers of rows; then a second start, and an epoch of packed global batches. Memory is
that of the process and all its children, anonymous pages only: what lies in mapped files is the
system's to drop. Rows are appended to benchmarks/results/data_speed. Exit code: 0, 3 a bar was
missed: 2,000 pairs/s with 1 worker, a second start within 1 s, 64 bytes a row of growing memory.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

BARS = {"pairs_per_s": 2000, "second_start_s": 1.0, "bytes_per_row": 64}
SAMPLE_S = 0.05


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    if args.measure is not None:
        print(json.dumps(measure(json.loads(args.measure))))
        return 0
    with tempfile.TemporaryDirectory(prefix="data_speed-") as folder:
        return _run(args, Path(folder))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="JSON lines of any shape; default: made-up rows")
    parser.add_argument("--tokenizer", help="folder or hub id; default: the embedded model's")
    parser.add_argument("--rows", type=int, default=100_000, help="that speeds are measured with")
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 50_000, 100_000, 200_000])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--pairs", type=int, default=128, help="of a global batch")
    parser.add_argument("--results", type=Path, help="where rows are appended")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one measurement, in its own process
    return parser.parse_args(argv)


def _run(args: argparse.Namespace, folder: Path) -> int:
    from benchmarks.measure import RESULTS, append_rows, machine
    from reinforcer_tp.embedded import ensure_embedded

    tokenizer = args.tokenizer or str(ensure_embedded().model)
    files = {size: folder / f"{size}.jsonl" for size in {args.rows, *args.sizes}}
    for size, path in files.items():
        write_rows(path, args.data, size)
    case = {"tokenizer": tokenizer, "pairs": args.pairs}
    # The first start may have files to read from disk: it is not counted.
    _in_process(case | {"data": str(write_rows(folder / "few.jsonl", args.data, 200))}, folder, 1)
    one = _in_process(case | {"data": str(files[args.rows])}, folder / "one", 1)
    again = _in_process(case | {"data": str(files[args.rows])}, folder / "one", 1)
    many = {}
    for size in sorted({args.rows, *args.sizes}):
        own = case | {"data": str(files[size])}
        many[size] = _in_process(own, folder / f"many{size}", args.workers)
    row = {
        "benchmark": "data_speed",
        "data": args.data.name if args.data else "made-up",
        "tokenizer": Path(args.tokenizer).name if args.tokenizer else "embedded",
        "rows": args.rows,
        "tokens_per_pair": one["tokens_per_pair"],
        "pairs_per_s": {"1": one["pairs_per_s"], str(args.workers): many[args.rows]["pairs_per_s"]},
        "cpu_us_per_pair": one["cpu_us_per_pair"],
        "second_start_s": again["prepare_s"],
        "peak_bytes": {str(size): found["peak_bytes"] for size, found in many.items()},
        "parent_peak_bytes": {str(s): found["parent_peak_bytes"] for s, found in many.items()},
        "bytes_per_row": _slope({size: found["peak_bytes"] for size, found in many.items()}),
        "pairs_a_batch": args.pairs,
        "batch_ms": one["batch_ms"],
        "pack_epoch_s": one["pack_epoch_s"],
    }
    missed = _tell(row, args.workers)
    results = args.results or RESULTS / "data_speed"
    print(f"appended to {append_rows(results, [machine('cpu') | row])}")
    return 3 if missed else 0


def _tell(row: dict, workers: int) -> bool:
    """Prints what was found; whether a bar was missed."""
    speeds = row["pairs_per_s"]
    mib = {size: value / 2**20 for size, value in row["peak_bytes"].items()}
    print(
        f"{row['rows']:,} rows of {row['data']}, {row['tokens_per_pair']:.0f} tokens a pair: "
        f"{speeds['1']:,.0f} pairs/s with 1 worker on 1 CPU, {speeds[str(workers)]:,.0f} with "
        f"{workers} on {workers} ({speeds[str(workers)] / workers:,.0f} a CPU); second start "
        f"{row['second_start_s']:.2f} s"
    )
    print(
        "peak memory over the start's, MiB: "
        + ", ".join(f"{int(size):,} rows {value:.0f}" for size, value in mib.items())
        + f"; {row['bytes_per_row']:.0f} bytes a row"
    )
    print(
        f"packing: {row['batch_ms']['median']:.1f} ms a global batch of {row['pairs_a_batch']} "
        f"pairs (p99 {row['batch_ms']['p99']:.1f}), {row['pack_epoch_s']:.1f} s an epoch"
    )
    met = {
        "pairs_per_s": speeds["1"] >= BARS["pairs_per_s"],
        "second_start_s": row["second_start_s"] <= BARS["second_start_s"],
        "bytes_per_row": row["bytes_per_row"] <= BARS["bytes_per_row"],
    }
    print("; ".join(f"{k} (bar {BARS[k]}): {'met' if ok else 'missed'}" for k, ok in met.items()))
    return not all(met.values())


def _slope(values: dict[int, int]) -> float:
    """Bytes that each more row takes: of the line of least squares; 0 for one size."""
    if len(values) < 2:
        return 0.0
    return float(np.polyfit(list(values), list(values.values()), 1)[0])


def write_rows(path: Path, data: Path | None, count: int) -> Path:
    """`count` different rows in JSON lines."""
    rows = list(_made_up()) if data is None else _read(data)
    with path.open("w", encoding="utf-8") as stream:
        for index in range(count):
            stream.write(json.dumps(_numbered(rows[index % len(rows)], index)) + "\n")
    return path


def _read(path: Path) -> list[dict]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        return [json.loads(line) for line in stream if line.strip()]


def _numbered(row: dict, index: int) -> dict:
    side = row["chosen"]
    if isinstance(side, str):
        return row | {"chosen": f"{side} {index}"}
    last = side[-1] | {"content": f"{side[-1]['content']} {index}"}
    return row | {"chosen": [*side[:-1], last]}


def _made_up() -> Iterator[dict]:
    """1,000 rows of one turn: some 16 words of the user, 13 of each response."""
    draw = random.Random(0)
    syllables = [a + b for a in ("", *"bdfgklmnprst") for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(2000)]

    def text(mean: float) -> str:
        return " ".join(draw.choices(words, k=max(3, round(draw.gauss(mean, mean / 3))))) + "."

    for _ in range(1000):
        yield {
            "prompt": [{"role": "user", "content": text(16)}],
            "chosen": [{"role": "assistant", "content": text(13)}],
            "rejected": [{"role": "assistant", "content": text(13)}],
        }


def _in_process(case: dict, folder: Path, workers: int) -> dict:
    """`measure` in a new process that may use as many CPUs as it has workers."""
    folder.mkdir(exist_ok=True)
    cpus = sorted(os.sched_getaffinity(0))[:workers]
    caches = {"HF_DATASETS_CACHE": str(folder / "hf"), "REINFORCER_TP_CACHE": str(folder / "own")}
    asked = json.dumps(case | {"workers": workers, "cpus": cpus})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.data_speed", "--measure", asked],
        env=os.environ | caches,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"a measurement failed: {done.stderr.strip()[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: dict) -> dict:
    """Prepares `case["data"]` and packs an epoch of it; times in seconds."""
    os.sched_setaffinity(0, case["cpus"])
    from reinforcer_tp.data.prepare import prepare_data
    from reinforcer_tp.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(case["tokenizer"])
    section = {"dataset_name": "auto", "train_data_path": case["data"]}
    memory = _Peak()
    begin, cpu = time.perf_counter(), os.times()
    data = prepare_data(
        section | {"num_workers": case["workers"]}, tokenizer=tokenizer,
        max_total_sequence_length=2048,
    )  # fmt: skip
    prepare_s, used = time.perf_counter() - begin, os.times()
    peaks = memory.stop()
    cpu_s = sum(used[:4]) - sum(cpu[:4])
    return (
        peaks
        | _pack_epoch(data.train, case["pairs"])
        | {
            "prepare_s": prepare_s,
            "pairs_per_s": data.report["train"]["rows_read"] / prepare_s,
            "cpu_us_per_pair": cpu_s / len(data.train) * 1e6,
            "tokens_per_pair": len(data.train.tokens) / len(data.train),
        }
    )


def _pack_epoch(pairs, batch_size: int) -> dict:
    """What the first rank of two does in each step of an epoch."""
    from reinforcer_tp.data.loader import global_batch_rows, steps_per_epoch
    from reinforcer_tp.data.micro_batches import MicroBatching, micro_batches

    cut = MicroBatching(
        max_tokens=8192, max_pairs=None, dp_rank=0, dp_size=2, divisible_by=1, equal_rows=False
    )
    batch_size = min(batch_size, len(pairs))
    seconds = []
    for step in range(steps_per_epoch(len(pairs), batch_size)):
        begin = time.perf_counter()
        rows = global_batch_rows(len(pairs), batch_size, seed=0, step=step, shuffle=True)
        micro_batches(pairs, rows, cut)
        seconds.append(time.perf_counter() - begin)
    median, p99 = np.percentile(seconds, [50, 99]) * 1e3
    return {
        "pack_epoch_s": sum(seconds),
        "batch_ms": {"median": float(median), "p99": float(p99), "max": max(seconds) * 1e3},
    }


class _Peak:
    """Most anonymous memory of this process, and of it with its children, over what it has now."""

    def __init__(self) -> None:
        self._start = _anonymous_bytes(os.getpid())
        self._own = self._tree = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_S):
            own = _anonymous_bytes(os.getpid())
            tree = own + sum(map(_private_bytes, _children(os.getpid())))
            self._own, self._tree = max(self._own, own), max(self._tree, tree)

    def stop(self) -> dict[str, int]:
        self._stopped.set()
        self._thread.join()
        return {
            "peak_bytes": max(self._tree - self._start, 0),
            "parent_peak_bytes": max(self._own - self._start, 0),
        }


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = [int(child) for child in task.read_text().split()]
        except OSError:  # it has ended
            continue
        for child in found:
            yield child
            yield from _children(child)


def _anonymous_bytes(pid: int) -> int:
    return _field(f"/proc/{pid}/status", "RssAnon:")


def _private_bytes(pid: int) -> int:
    """What a fork does not share with the process that it came from."""
    return _field(f"/proc/{pid}/smaps_rollup", "Private_Dirty:")


def _field(path: str, name: str) -> int:
    try:
        with open(path) as stream:
            line = next(islice((line for line in stream if line.startswith(name)), 1))
    except (OSError, StopIteration):  # the process has ended
        return 0
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
