"""What needs a GPU, with one command in under 10 minutes: python -m benchmarks.gpu_suite

DPO of a random 1B Llama with its MFU, the plan beside it, the gpu-marked tests, the operator
against installed rivals, and the codegen gate. A part that fails or reaches its limit is recorded
and the others still run. After every part benchmarks/results/gpu/ has one JSON and one Markdown
table of this run. Nothing is downloaded.
Exit code: 0, 1 a part failed or was not run (missed targets are only printed), 2 no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.codegen import ARCHS
from benchmarks.dpo_run import summary
from benchmarks.measure import RESULTS, read_rows, slug
from benchmarks.suite_parts import Outcome, Part, run_part, stop_with_parts
from benchmarks.suite_report import about_machine, markdown
from benchmarks.suite_targets import TARGET_SHAPES, judged
from reinforcer_tp.whole_files import write_whole

NAMES = ("dpo", "plan", "tests", "benchmark", "codegen")  # in the order of value
BUDGET_S = 580.0  # besides, the suite imports torch and kills what is late
LEAST_S = 10.0  # no part is begun with less


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    if not torch.cuda.is_available():
        print("error: no CUDA device; the GPU suite runs only on one (nothing was run)")
        return 2
    stop_with_parts()
    began = datetime.now(UTC)
    device = torch.cuda.get_device_name()
    stem = f"{slug(device)}-{began:%Y-%m-%d-%H%M}"
    with tempfile.TemporaryDirectory(prefix="gpu_suite-", ignore_cleanup_errors=True) as work:
        known = parts(device, Path(work), args.results.resolve(), began)
        chosen = [part for part in known if part.name in args.parts]
        return run_suite(chosen, args.results / "gpu" / stem, about_machine(), args.budget_s)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for all parts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where rows are appended")
    return parser.parse_args(argv)


def parts(device: str, work: Path, results: Path, began: datetime) -> list[Part]:
    """The parts with their limits, which fit into BUDGET_S together."""
    run = work / "dpo" / "run"
    plan = ["--compare", str(run), "--gpu", device, "--json"]
    # Rounds of slow rivals are cut; ours have all.
    operator = ["--device", "cuda", "--shape", *TARGET_SHAPES, "--budget-s", "5"]
    pytest = ["-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    return [
        Part(
            name="dpo",
            arguments=["-m", "benchmarks.dpo_run", "--work", str(run.parent)],
            limit_s=130,
            read=lambda _: summary(run, "llama1b"),
        ),
        Part(
            name="plan",
            arguments=["-m", "reinforcer_tp.plan", *plan],
            limit_s=30,
            read=read_plan,
            needs=run,
        ),
        Part(name="tests", arguments=pytest, limit_s=200, read=read_tests),
        Part(
            name="benchmark",
            arguments=["-m", "benchmarks.linear_logprob", *operator, "--results", str(results)],
            limit_s=160,
            read=lambda _: {"rows": rows_since(results, began.isoformat(timespec="seconds"))},
        ),
        Part(
            name="codegen",
            arguments=["-m", "benchmarks.codegen", "--quick", "--arch", own_arch()],
            limit_s=60,
            read=lambda stdout: {"compiled": re.findall(r"^\d+ kernels in .*", stdout, re.M)},
        ),
    ]


def own_arch() -> str:
    """Of the architectures that the gate knows: this device's, else the newest below it."""
    major, minor = torch.cuda.get_device_capability()
    known = [arch for arch in ARCHS if isinstance(arch, int)]
    return str(max((arch for arch in known if arch <= 10 * major + minor), default=min(known)))


def run_suite(chosen: list[Part], stem: Path, machine: dict, budget_s: float) -> int:
    """Runs the parts in turn and writes `stem`.json and .md after each; the exit code."""
    start = time.monotonic()
    outcomes = {part.name: Outcome(verdict="not run: not yet") for part in chosen}
    for index, part in enumerate(chosen):
        left = budget_s - (time.monotonic() - start)
        if left < min(LEAST_S, part.limit_s):
            verdict = f"not run: the budget of {budget_s:g} s is spent"
            outcomes[part.name] = Outcome(verdict=verdict)
        else:
            later_s = sum(later.limit_s for later in chosen[index + 1 :])
            # What earlier parts have not used is this one's.
            limit_s = min(left, max(part.limit_s, left - later_s))
            outcomes[part.name] = run_part(part, limit_s)
        report = as_json(machine, outcomes, time.monotonic() - start, budget_s)
        write_report(stem, report)
        print(f"{part.name}: {outcomes[part.name].verdict}", flush=True)
    print(f"\n{markdown(report)}\nwritten: {stem}.json and .md")
    return 0 if all(outcome.passed for outcome in outcomes.values()) else 1


def as_json(machine: dict, outcomes: dict[str, Outcome], seconds: float, budget_s: float) -> dict:
    rows = outcomes["benchmark"].found.get("rows", []) if "benchmark" in outcomes else []
    return {
        "machine": machine,
        "seconds": round(seconds, 1),
        "budget_s": budget_s,
        "parts": {name: asdict(outcome) for name, outcome in outcomes.items()},
        "targets": judged(rows) if "benchmark" in outcomes else [],
    }


def write_report(stem: Path, report: dict) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    texts = {"json": json.dumps(report, indent=1) + "\n", "md": markdown(report)}
    for kind, text in texts.items():
        write_whole(stem.with_name(f"{stem.name}.{kind}"), text.encode())


def read_tests(stdout: str) -> dict:
    """Counts and failures from `pytest -v`, line by line: a session that was killed has no more."""
    verdicts = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", stdout, re.M)
    counts = {
        word: len([name for name, verdict in verdicts if verdict == word.upper()])
        for word in ("passed", "failed", "error", "skipped")
    }
    failures = [name for name, verdict in verdicts if verdict in ("FAILED", "ERROR")]
    reasons = re.findall(r"^SKIPPED \[\d+\] [^ ]+ (.*)$", stdout, re.M)
    collected = re.search(r"collected (\d+) items?(?:.* (\d+) selected)?", stdout)
    unfinished = re.search(r"^(\S+::.*) \Z", stdout, re.M)
    return counts | {
        "selected": int(collected[2] or collected[1]) if collected else None,
        "failures": failures,
        "skipped_because": reasons,
        "killed_in": unfinished and unfinished[1],
        "wrong": [] if verdicts and counts["passed"] else ["no test passed"],
    }


def read_plan(stdout: str) -> dict:
    """The JSON object that `reinforcer_tp.plan --compare --json` prints."""
    found = json.loads(stdout[stdout.index("{") : stdout.rindex("}") + 1])
    missing = [key for key in ("predicted", "measured") if key not in found]
    if missing:
        raise ValueError(f"no {' and no '.join(missing)} in the plan's {list(found)}")
    return found


def rows_since(directory: Path, began: str) -> list[dict]:
    files = sorted(directory.glob("*.jsonl"))
    return [row for path in files for row in read_rows(path) if row["date"] >= began]


if __name__ == "__main__":
    sys.exit(main())
