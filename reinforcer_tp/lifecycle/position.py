"""Where this process is: the last finished step and the phase. Written by the main thread only."""

import time

PHASES = (  # in the order in which a run goes through them
    *("start", "data", "rendezvous", "reference", "sweep", "load"),
    *("step", "compute", "optimizer", "validation", "save", "export"),
)
STEP_PARTS = frozenset({"step", "compute", "optimizer"})
# Where cluster.hang_timeout_s counts. Elsewhere files are read and written, which may take long.
LIMITED = STEP_PARTS | {"sweep", "validation"}


class Position:
    """Plain attributes, which other threads may read at any time."""

    def __init__(self) -> None:
        self.phase = "start"
        self.step: int | None = None  # the last finished one; None before the loop
        self.agreed: int | None = None  # the last one that all ranks have finished
        self.start_step: int | None = None  # the one that this attempt began after
        self.saved_step: int | None = None  # of the newest checkpoint that this attempt wrote
        self.ticks = 0  # grows with any progress
        self.moved_at = time.monotonic()

    def tick(self) -> None:
        self.ticks += 1
        self.moved_at = time.monotonic()

    def enter(self, phase: str) -> None:
        assert phase in PHASES, phase
        self.phase = phase
        self.tick()

    def text(self) -> str:
        return (
            f"last step {self.step if self.step is not None else 'none'}, last phase {self.phase}"
        )
