"""What a goal of the fault suite reports."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    """One goal's counts; it holds where nothing is listed under `failures`."""

    goal: str  # G1 .. G10
    title: str  # what must hold, in a line
    counts: dict[str, int | float]  # what was done and found
    failures: list[str]  # a line each: the case and what was wrong

    @property
    def ok(self) -> bool:
        return not self.failures

    def describe(self) -> str:
        """For a terminal: a line, then one for each of the first failures."""
        counts = ", ".join(f"{name} {_number(value)}" for name, value in self.counts.items())
        lines = [f"{self.goal:<4}{'ok' if self.ok else 'FAILED':<7}{self.title}: {counts}"]
        lines += [f"      {failure}" for failure in self.failures[:20]]
        if len(self.failures) > 20:
            lines.append(f"      and {len(self.failures) - 20} more")
        return "\n".join(lines)


def _number(value: int | float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else f"{value}"
