"""How our own training step grows: with tokens, with micro-batches, and over 200 steps.

    python -m benchmarks.step_scaling --model FOLDER --data PAIRS.jsonl[.gz]

Runs of the real train.py on the CPU. A step takes the same pairs once, twice, four times, in one,
two and four micro-batches of as many tokens: time must be linear in tokens (the time of a token may
grow by 10 % at most) and peak memory flat in micro-batches (5 %). Then 200 steps of the small
embedded model: the memory that the process holds may grow by 1 % from its third quarter to its
fourth. Rows are appended to benchmarks/results/step_scaling. Exit code: 0, 1 a run failed, 3 a bar
was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import RESULTS, append_rows, machine, statistics
from benchmarks.vs_trl_rows import select_pairs, shared_tokens
from benchmarks.vs_trl_runs import MAX_LENGTH, ROOT, Watched, read_lines, watch
from reinforcer_tp.data.tokenizer import load_tokenizer

TIMES = (1, 2, 4)  # how often a step takes the pairs
STEPS = {1: 5, 2: 4, 4: 3}  # of a run
TIME_BAR, MEMORY_BAR, GROWTH_BAR = 1.10, 1.05, 1.01
WITHOUT_THE_REST = (
    *("dpo.val_period=0", "checkpointing.enabled=false", "checkpointing.export_hf=false"),
    "logger.tensorboard_enabled=false",
)


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    torch.set_num_threads(args.threads)  # what the runs get, for the rows
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = [*scaling_rows(args, Path(folder)), growth_row(args, Path(folder) / "growth")]
    except (RuntimeError, ValueError) as error:
        print(f"FAILED {error}")
        return 1
    about = machine("cpu") | {"benchmark": "step_scaling", "threads": args.threads}
    path = append_rows(args.results, [about | row for row in rows])
    bars = verdicts(rows)
    for met, said in bars:
        print(f"{'met   ' if met else 'MISSED'} {said}")
    print(f"appended to {path}")
    return 0 if all(met for met, _ in bars) else 3


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="jsonl or jsonl.gz")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--pairs", type=int, default=4, help="that a step takes 1, 2, 4 times")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each, taking turns")
    parser.add_argument("--growth-steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS / "step_scaling")
    return parser.parse_args(argv)


def scaling_rows(args: argparse.Namespace, folder: Path) -> list[dict]:
    """A row for each of TIMES, of all rounds together."""
    tokenizer = load_tokenizer(str(args.model), None)
    pairs, _ = select_pairs(args.data, tokenizer, args.pairs, MAX_LENGTH)
    tokens = sum(map(shared_tokens, pairs))
    text = "".join(json.dumps(pair.row) + "\n" for pair in pairs)
    runs: dict[int, list[tuple[list[dict], float]]] = {times: [] for times in TIMES}
    for round_ in range(args.rounds):
        for times in TIMES:
            work = folder / f"{times}-{round_}"
            work.mkdir()
            rows = work / "rows.jsonl"
            rows.write_text(text * times * STEPS[times], encoding="utf-8")
            overrides = _overrides(args, rows, tokens, args.pairs * times, STEPS[times])
            watched, metrics = train(overrides, work, args.threads)
            runs[times].append((metrics, watched.peak_gib))
            print(f"{times}x: {watched.peak_gib:.2f} GiB, {_step_seconds(metrics)} s", flush=True)
    return [_scaling_row(args, times, tokens, runs[times]) for times in TIMES]


def _overrides(
    args: argparse.Namespace, rows: Path, tokens: int, pairs: int, steps: int
) -> list[str]:
    return [
        f"policy.model_name={args.model.resolve()}",
        f"policy.precision={args.precision}",
        f"policy.train_global_batch_size={pairs}",
        f"policy.micro_batch_tokens={tokens}",
        f"policy.max_total_sequence_length={MAX_LENGTH}",
        "policy.megatron_cfg.optimizer.lr=1e-6",
        f"reference.micro_batch_tokens={tokens}",  # else the sweep's rows decide the peak
        "data.dataset_name=auto",
        f"data.train_data_path={rows}",
        "data.shuffle=false",
        f"dpo.max_num_steps={steps}",
        "dpo.max_num_epochs=1",
    ]


def train(overrides: list[str], work: Path, threads: int) -> tuple[Watched, list[dict]]:
    """A run in `work`, and its metrics of every step."""
    run = work / "run"
    command = [sys.executable, str(ROOT / "reinforcer_tp" / "train.py"), *overrides]
    command += [*WITHOUT_THE_REST, f"reference.store_dir={work / 'store'}", f"logger.log_dir={run}"]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        "REINFORCER_TP_CACHE": str(work / "cache"),
    }
    watched = watch(command, environment, run / "metrics.jsonl", work / "output.txt")
    return watched, read_lines(run / "metrics.jsonl")


def _step_seconds(metrics: list[dict]) -> list[float]:
    return [round(line["perf/step_s"], 3) for line in metrics]


def _scaling_row(
    args: argparse.Namespace, times: int, tokens: int, runs: list[tuple[list[dict], float]]
) -> dict:
    """The first step of each run warms up and is no part. ValueError where tokens are not as
    meant: then the ratio would compare other things."""
    steps = [line for metrics, _ in runs for line in metrics[1:]]
    found = {line["train/num_tokens"] for line in steps}
    if found != {tokens * times}:
        raise ValueError(f"{times}x: steps of {sorted(found)} tokens, expected {tokens * times}")
    return {
        "what": "scaling",
        "model": args.model.name,
        "precision": args.precision,
        "times": times,
        "pairs": args.pairs * times,
        "tokens": tokens * times,
        "micro_batch_tokens": tokens,
        "step": statistics([line["perf/step_s"] for line in steps]),
        "compute": statistics([line["perf/compute_s"] for line in steps]),
        "peak_gib": max(peak for _, peak in runs),
    }


def growth_row(args: argparse.Namespace, work: Path) -> dict:
    """Memory of a long run of the embedded model, step by step."""
    work.mkdir()
    overrides = [f"dpo.max_num_steps={args.growth_steps}", "dpo.max_num_epochs=100"]
    watched, _ = train(overrides, work, args.threads)
    held = held_after_steps(watched)
    return {"what": "growth", "model": "embedded", "steps": len(held)} | growth(held)


def held_after_steps(watched: Watched) -> np.ndarray:
    """(steps,) MiB that the process held at the end of each step."""
    times, kib = np.array(watched.held_kib).T
    return np.interp(watched.stamps, times, kib) / 2**10


def growth(held: np.ndarray) -> dict:
    """Medians of the quarters (MiB), and the slope over the second half (KiB a step)."""
    quarters = [float(np.median(part)) for part in np.array_split(held, 4)]
    late = held[len(held) // 2 :]
    slope = float(np.polyfit(np.arange(len(late)), late, 1)[0])
    return {"quarters_mib": quarters, "slope_kib_a_step": slope * 2**10}


def verdicts(rows: list[dict]) -> list[tuple[bool, str]]:
    """(met, text) of every bar."""
    found, by_times = [], {row["times"]: row for row in rows if row["what"] == "scaling"}
    base = by_times[1]
    for times, row in by_times.items():
        if times == 1:
            continue
        ratios = {
            part: row[part]["median_s"] / base[part]["median_s"] / times
            for part in ("step", "compute")
        }
        found.append(
            (
                ratios["step"] <= TIME_BAR,
                f"{times}x tokens ({row['tokens']:,}): {row['step']['median_s']:.2f} s, a token "
                f"takes {ratios['step']:.2f} of its time at 1x (forward and backward alone "
                f"{ratios['compute']:.2f}), bar {TIME_BAR:g}",
            )
        )
        memory = row["peak_gib"] / base["peak_gib"]
        found.append(
            (
                memory <= MEMORY_BAR,
                f"{times}x micro-batches: peak {row['peak_gib']:.2f} GiB, {memory:.3f} of that of "
                f"one, bar {MEMORY_BAR:g}",
            )
        )
    for row in rows:
        if row["what"] == "growth":
            third, fourth = row["quarters_mib"][2:]
            found.append(
                (
                    fourth <= GROWTH_BAR * third,
                    f"{row['steps']} steps: {third:.1f} MiB in the third quarter, {fourth:.1f} in "
                    f"the fourth, {row['slope_kib_a_step']:+.1f} KiB a step over the second half; "
                    f"bar {GROWTH_BAR - 1:.0%} more",
                )
            )
    return found


if __name__ == "__main__":
    sys.exit(main())
