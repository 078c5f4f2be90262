"""Result files by hand, one row of each benchmark."""

import json
from pathlib import Path

MACHINE = {
    "date": "2026-01-02T00:00:00+00:00", "commit": "0123456789ab", "torch": "2.13.0",
    "device": "Some CPU, 2 cores", "threads": 2, "cpu_flags": {"amx": True},
}  # fmt: skip


def times(median: float, spread: float = 0.02) -> dict[str, float]:
    """A median with percentiles `spread` of it to both sides."""
    return {
        "median_s": median,
        "p20_s": median * (1 - spread),
        "p80_s": median * (1 + spread),
        "min_s": median * (1 - 2 * spread),
        "repeats": 7,
    }


def operator_row(seconds: float = 0.2, *, spread: float = 0.02, **fields) -> dict:
    case = {"shape": "smollm2", "n": 512, "dtype": "float32", "contender": "ours-strict"}
    row = MACHINE | {"benchmark": "linear_logprob", **case, "pass": "both", "extra_bytes": 2**20}
    return row | times(seconds, spread) | fields


def attention_row(seconds: float, contender: str = "ours", **fields) -> dict:
    case = {"case": "64 short", "dtype": "float32", "contender": contender, "segments": 64}
    row = MACHINE | {"benchmark": "attention", "speedup": 3.0, **case}
    return row | times(seconds) | fields


def prompts_row(**fields) -> dict:
    case = {"model": "tiny", "data": "d", "precision": "float32", "pairs": 8}
    return (
        MACHINE
        | {"benchmark": "shared_prompts", **case, "micro_batch_tokens": 4096}
        | {"tokens": {"prompt": 100, "nothing": 150}, "token_ratio": 1.5, "speed_up": 1.4}
        | {"step": {"nothing": times(1.4), "prompt": times(1.0)}}
        | fields
    )


def store_row(store_s: float = 4.0) -> dict:
    case = {"model": "embedded", "precision": "float32", "steps": 30, "pairs_a_step": 32}
    epoch = {"resident": times(5.0), "store": times(store_s), "cold": times(6.0)}
    speeds = {"speed_up": 5.0 / store_s, "speed_up_with_sweep": 5 / 6}
    return MACHINE | {"benchmark": "reference_store", **case, "epoch": epoch} | speeds


def write_rows(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_report(path: Path, rows: dict[str, list[dict]], verdict: str = "passed") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {name: {"verdict": verdict, "found": {"rows": of}} for name, of in rows.items()}
    path.write_text(json.dumps({"machine": MACHINE, "parts": parts}))
    return path
