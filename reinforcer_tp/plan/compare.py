"""What a run needed beside what its plan says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from reinforcer_tp.config import Config, ConfigError, load_config
from reinforcer_tp.strict_json import parse_json
from reinforcer_tp.untrusted import read_json

_LINE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of rank 0, from metrics.jsonl."""

    step_s: float  # median without the first step
    peak_gib: float  # most that was held: of the card, or of the host over what it held before
    num_steps: int


def open_run(folder: Path) -> tuple[Config, int, int, Measured]:
    """(configuration, world size, processes on a node, what was measured). Raises ConfigError."""
    for name in ("config.yaml", "environment.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise ConfigError(
                f"--compare={folder}: there is no {name}; expected the folder of a run that has "
                "taken steps (its logger.log_dir)"
            )
    config = load_config(str(folder / "config.yaml"), [])
    environment = read_json(folder / "environment.json")
    world_size = int(environment["world_size"])
    return config, world_size, world_size // int(environment["num_nodes"]), _measured(folder)


def _measured(folder: Path) -> Measured:
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    steps = [parse_json(line[:_LINE_BYTES]) for line in lines]
    steps = [step for step in steps if "perf/step_s" in step]
    if len(steps) < 2:
        raise ConfigError(
            f"--compare={folder}: metrics.jsonl has {len(steps)} steps; expected at least 2, since "
            "the first one compiles and allocates"
        )
    before = steps[0].get("memory/before_model_gib", 0.0)
    return Measured(
        step_s=median(step["perf/step_s"] for step in steps[1:]),
        peak_gib=max(step["memory/peak_gib"] for step in steps) - before,
        num_steps=len(steps),
    )


def comparison(predicted: dict[str, Any], measured: Measured) -> dict[str, Any]:
    """{"predicted", "measured", "ratio"}, each with step_s and peak_gib."""
    found = {"step_s": measured.step_s, "peak_gib": measured.peak_gib}
    planned = {
        "step_s": predicted["time"]["step_s"],
        "peak_gib": predicted["stages"][0]["held_gib"],
    }
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
