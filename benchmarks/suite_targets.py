"""What the fused operator is to reach on one H100, bfloat16, N = 8192."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod

from benchmarks.contenders import SHAPES

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Target:
    """A limit for one H100, bfloat16, N = 8192."""

    shape: str
    contender: str
    pass_name: str
    key: str  # of the row: median_s or extra_bytes
    limit: float
    note: str


TARGETS = [
    Target(shape="llama8b-131072", contender="ours-strict", pass_name="forward", key="median_s",
           limit=13.5e-3, note="best published: Liger SM90, 12.25 ms"),
    Target(shape="llama8b-131072", contender="ours-cached", pass_name="both", key="median_s",
           limit=42e-3, note="best published: Liger SM90, 50.4 ms"),
    Target(shape="llama8b-131072", contender="ours-strict", pass_name="both", key="median_s",
           limit=54e-3, note="best published: Liger SM90, 50.4 ms"),
    Target(shape="llama70b-tp8", contender="ours-cached", pass_name="both", key="median_s",
           limit=10.5e-3, note="the target has the collectives, the measurement has not"),
    Target(shape="llama70b-tp8", contender="ours-cached", pass_name="both", key="extra_bytes",
           limit=0.5 * GIB, note="with the float32 dhidden; verl 0.5 GiB, Liger-TP 1.8 GiB"),
    Target(shape="llama70b-tp8", contender="ours-strict", pass_name="both", key="extra_bytes",
           limit=0.3 * GIB, note="with the float32 dhidden"),
]  # fmt: skip
# The smallest first: its rows are written before the next one begins.
TARGET_SHAPES = sorted({target.shape for target in TARGETS}, key=lambda name: prod(SHAPES[name]))


def judged(rows: list[dict]) -> list[dict]:
    """Every target with what was `measured` (None: nothing) and a verdict."""
    measured = {
        (row["shape"], row["contender"], row["pass"]): row
        for row in rows
        if row["n"] == 8192 and row["dtype"] == "bfloat16" and row["device_type"] == "cuda"
    }
    lines = []
    for target in TARGETS:
        row = measured.get((target.shape, target.contender, target.pass_name), {})
        value = row.get(target.key)
        verdict = "NOT MEASURED" if value is None else "met" if value <= target.limit else "MISSED"
        lines.append(asdict(target) | {"measured": value, "verdict": verdict})
    return lines


def shown(value: float | None, key: str) -> str:
    if value is None:
        return "-"
    return f"{1e3 * value:.2f} ms" if key == "median_s" else f"{value / GIB:.3f} GiB"
