"""What a run knows of its past steps; its checkpoints keep it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reinforcer_tp.health import HealthWatch

Metrics = Mapping[str, float | None]


@dataclass(kw_only=True)
class Memory:
    """Metrics of the steps so far, and the watch over the run's health."""

    watch: HealthWatch
    latest: dict[str, float | None] = field(default_factory=dict)  # last known value of each metric
    history: list[dict[str, float | None]] = field(default_factory=list)  # of each validation

    def restore(self, saved: Mapping[str, Any]) -> None:
        """The inverse of `to_json`."""
        self.watch.restore(saved["health"])
        self.latest, self.history = dict(saved["latest"]), list(saved["history"])

    def to_json(self) -> dict[str, Any]:
        return {"health": self.watch.to_json(), "latest": self.latest, "history": self.history}

    def trained(self, metrics: Metrics) -> None:
        """A skipped step has learnt nothing: its numbers that are not finite say nothing."""
        self.latest |= {n: v for n, v in metrics.items() if v is not None and math.isfinite(v)}

    def validated(self, step: int, metrics: Metrics) -> None:
        known = {n: v if v is not None and math.isfinite(v) else None for n, v in metrics.items()}
        self.latest |= known
        self.history.append({"step": step, **known})

    def lacks_validation(self, step: int) -> bool:
        """A run that was stopped in haste saved before it validated."""
        return all(line["step"] != step for line in self.history)
