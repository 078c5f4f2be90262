"""The time from the demo's command to its first step, and what it goes into.

    python -m benchmarks.startup [--rounds 3]

Runs `make demo`'s command (without make and pip) until it prints its first step, and stops it.
`cold` starts with an empty cache folder, as a newcomer does: no demo files, no tokenized data, no
reference. `warm` finds all of them. The two take turns. Where time goes is seen from outside: when
the first rank's process begins (`launcher`), when its attempt's folder is there (`configuration`),
each phase that its heartbeat names, and the line of the first step. CPU seconds are those of the
launcher and all ranks, and say more than the clock on a machine that does other things as well.
A row each is appended to benchmarks/results/startup. Exit code: 0, 1 a run failed, 3 the median of
the cold starts missed the bar of 15 s.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.measure import RESULTS, append_rows, machine, statistics

BAR_S = 15.0
POLL_S = 0.01
LAST_PART = "validation and first step"  # the heartbeat tells a step when it is over
ROOT = Path(__file__).resolve().parents[1]
_TICKS = os.sysconf("SC_CLK_TCK")  # a second


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each kind")
    parser.add_argument("--results", type=Path, default=RESULTS / "startup")
    args = parser.parse_args(argv)
    starts: dict[str, list[dict]] = {"cold": [], "warm": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for kind, found in starts.items():
                found.append(Start(Path(folder), kind).run())
                print(f"{kind}: first step after {found[-1]['first_step_s']:.1f} s", flush=True)
    rows = [machine("cpu") | summary(kind, found) for kind, found in starts.items()]
    for row in rows:
        print(describe(row))
    print(f"appended to {append_rows(args.results, rows)}")
    return 0 if rows[0]["first_step"]["median_s"] <= BAR_S else 3


def demo_command(log_dir: Path) -> list[str]:
    """What `make demo` runs, with this Python and another log_dir."""
    make = ["make", "--no-print-directory", "-n", "demo"]
    text = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = text.replace("\\\n", " ").splitlines()
    [line] = [line for line in lines if "reinforcer_tp/train.py" in line]
    words = shlex.split(line.split(" logger.log_dir=")[0])
    return [sys.executable, *words[words.index("-m") :], f"logger.log_dir={log_dir}"]


class Start:
    """One start of the demo, watched from outside."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.cache = folder / "cache"
        self.log_dir = folder / kind
        self.marks: list[tuple[str, float]] = []  # what ended, and when
        self.ranks: list[int] = []  # pids
        self.is_over = threading.Event()

    def run(self) -> dict:
        """Seconds of each part, and CPU seconds; RuntimeError where there was no first step."""
        environment = os.environ | {
            "REINFORCER_TP_CACHE": str(self.cache),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        begin = time.monotonic()
        process = subprocess.Popen(
            demo_command(self.log_dir),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        watch = threading.Thread(target=self._watch, args=(process.pid, begin), daemon=True)
        watch.start()
        said, first_step_s = [], None
        try:
            for line in process.stdout:
                said.append(line)
                if line.startswith("step 1/"):
                    first_step_s = time.monotonic() - begin
                    break
            cpu_s = [_cpu_s(process.pid), *map(_cpu_s, self.ranks)]
        finally:
            self.is_over.set()
            watch.join()
            process.send_signal(signal.SIGTERM)
            said.append(process.communicate(timeout=120)[0])
        if first_step_s is None:
            raise RuntimeError(f"the demo made no step: {''.join(said)[-2000:]}")
        return {
            "first_step_s": first_step_s,
            "parts_s": _parts([*self.marks, (LAST_PART, first_step_s)]),
            "cpu_s": {"launcher": cpu_s[0], "ranks": cpu_s[1:]},
        }

    def _watch(self, launcher: int, begin: float) -> None:
        """Notes the end of each part: the launcher, the configuration, each phase."""
        part = "launcher"
        while not self.is_over.wait(POLL_S):
            now = time.monotonic() - begin
            self.ranks = _children(launcher)
            found = part
            if part == "launcher" and self.ranks:
                found = "configuration"
            elif part == "configuration" and (self.log_dir / "attempts" / "0001").is_dir():
                found = "imports"
            elif part not in ("launcher", "configuration"):
                found = self._phase() or part
            if found not in (part, "step"):
                self.marks.append((part, now))
                part = found

    def _phase(self) -> str | None:
        try:
            return json.loads((self.log_dir / "heartbeat").read_text())["phase"]
        except OSError:
            return None


def _parts(marks: list[tuple[str, float]]) -> dict[str, float]:
    """Seconds by part; a phase that is entered twice counts both times."""
    parts: dict[str, float] = {}
    before = 0.0
    for name, end in marks:
        parts[name] = parts.get(name, 0.0) + end - before
        before = end
    return parts


def _children(pid: int) -> list[int]:
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except OSError:
        return []


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def summary(kind: str, starts: list[dict]) -> dict:
    """The row of one kind of start: medians over its runs."""
    names = list(dict.fromkeys(name for start in starts for name in start["parts_s"]))
    parts = {name: _median([start["parts_s"].get(name, 0.0) for start in starts]) for name in names}
    ranks = np.array([start["cpu_s"]["ranks"] for start in starts])
    return {
        "benchmark": "startup",
        "kind": kind,
        "cores": os.cpu_count(),
        "load_1min": os.getloadavg()[0],
        "first_step": statistics([start["first_step_s"] for start in starts]),
        "parts_s": parts,
        "cpu_s": {
            "launcher": _median([start["cpu_s"]["launcher"] for start in starts]),
            "ranks": [float(seconds) for seconds in np.median(ranks, axis=0)],
        },
    }


def _median(values: list[float]) -> float:
    return float(np.median(values))


def describe(row: dict) -> str:
    """The timeline as text."""
    first = row["first_step"]
    cpu = row["cpu_s"]
    lines = [
        f"{row['kind']}: first step after {first['median_s']:.1f} s (median of {first['repeats']}, "
        f"{first['min_s']:.1f} at least); CPU seconds: launcher {cpu['launcher']:.1f}, ranks "
        + ", ".join(f"{seconds:.1f}" for seconds in cpu["ranks"])
    ]
    lines += [f"  {seconds:6.2f} s  {name}" for name, seconds in row["parts_s"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
