"""What a run needed beside what its plan says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from reinforcer_tp.config import Config, ConfigError, load_config
from reinforcer_tp.strict_json import parse_json
from reinforcer_tp.untrusted import read_json

if TYPE_CHECKING:
    from reinforcer_tp.plan.estimate import Plan

_LINE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of rank 0, from metrics.jsonl."""

    step_s: float  # median without the first step
    peak_gib: float  # most that was held: of the card, or of the host over what it held before
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What a run's folder says of it."""

    config: Config
    world_size: int
    per_node: int  # processes on a node
    card: str  # its name, or cpu
    measured: Measured


def open_run(folder: Path) -> FinishedRun:
    """Raises ConfigError where that is no run that has taken steps, naming the file."""
    for name in ("config.yaml", "environment.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise ConfigError(
                f"--compare={folder}: there is no {name}; expected the folder of a run that has "
                "taken steps (its logger.log_dir)"
            )
    path = folder / "environment.json"
    environment = read_json(path)
    sizes = [environment.get(name) for name in ("world_size", "num_nodes")]
    devices = environment.get("devices")
    known = all(isinstance(size, int) and size > 0 for size in sizes) and sizes[0] % sizes[1] == 0
    if not (known and isinstance(devices, list) and devices and isinstance(devices[0], str)):
        raise ConfigError(
            f"--compare={folder}: {path} has world_size={sizes[0]}, num_nodes={sizes[1]}, "
            f"devices={str(devices)[:80]}; expected what a run writes there"
        )
    return FinishedRun(
        config=load_config(str(folder / "config.yaml"), []),
        world_size=sizes[0],
        per_node=sizes[0] // sizes[1],
        card=devices[0].partition(" (")[0],  # environment.py: "cpu (2 cores, ...)"
        measured=_measured(folder / "metrics.jsonl"),
    )


def _measured(path: Path) -> Measured:
    steps, before = [], []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last end of line is torn
        try:
            value = parse_json(line[:_LINE_BYTES])
            if "perf/step_s" in value:
                steps.append([float(value[name]) for name in ("perf/step_s", "memory/peak_gib")])
            if "memory/before_model_gib" in value:
                before.append(float(value["memory/before_model_gib"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"--compare: line {number} of {path} is no metrics of a step "
                f"({type(error).__name__}: {error}); expected what a run writes there"
            ) from None
    if len(steps) < 2 or min(min(step) for step in steps) <= 0:
        raise ConfigError(
            f"--compare: {path} has {len(steps)} steps; expected at least 2 with perf/step_s and "
            "memory/peak_gib above 0, since the first one compiles and allocates"
        )
    return Measured(
        step_s=median(step_s for step_s, _ in steps[1:]),
        peak_gib=max(peak for _, peak in steps) - (before[-1] if before else 0.0),
        num_steps=len(steps),
    )


def comparison(plan: Plan, measured: Measured) -> dict[str, Any]:
    """{"predicted", "measured", "ratio"}, each with step_s and peak_gib."""
    found = {"step_s": measured.step_s, "peak_gib": measured.peak_gib}
    planned = {"step_s": plan.time.step_s, "peak_gib": plan.held_gib(0)}
    return {
        "predicted": planned,
        "measured": found,
        "ratio": {name: planned[name] / found[name] for name in found},
        "steps": measured.num_steps,
    }


def comparison_lines(found: dict[str, Any]) -> list[str]:
    predicted, measured, ratio = found["predicted"], found["measured"], found["ratio"]
    return [
        f"rank 0 over {found['steps']} steps    predicted   measured   ratio",
        f"peak memory, GiB          {predicted['peak_gib']:9.2f}  {measured['peak_gib']:9.2f}"
        f"  {ratio['peak_gib']:6.2f}",
        f"a step, s                 {predicted['step_s']:9.3f}  {measured['step_s']:9.3f}"
        f"  {ratio['step_s']:6.2f}",
    ]
