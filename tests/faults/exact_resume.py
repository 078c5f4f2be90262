"""G5: stopped at each of 24 steps and resumed, a run is the uninterrupted one, bit for bit.

One run per layout is stopped after every single step, by a kill, by SIGTERM and by the stop file in
turn, so that it is resumed 23 times. Each of its 24 checkpoints must equal the uninterrupted run's,
and each step's numbers. Layouts into one another: reshards.py.
"""

import random
from pathlib import Path

from tests.faults import reshards
from tests.faults.figures import Figures
from tests.faults.runs import (
    Live,
    Toy,
    checkpoints,
    differing,
    logged_steps,
    make_toy,
    straight,
    tensors,
    training_numbers,
)

STOPS = 24
LAYOUTS = ("dp2", "tp2", "pp2", "one")
LONG = (
    f"dpo.max_num_steps={STOPS}",
    "checkpointing.save_period=1",
    "checkpointing.keep_top_k=null",
)


def run(budget: float, seed: int, folder: Path) -> Figures:
    """Budget 1.0: 24 steps in four layouts; a tenth: every fourth step in one layout."""
    failures: list[str] = []
    counts: dict[str, int | float] = {"stops": 0, "checkpoints equal": 0, "steps equal": 0}
    source = random.Random(seed)
    layouts = LAYOUTS if budget >= 0.5 else (source.choice(LAYOUTS),)
    every = 1 if budget >= 0.5 else 4 if budget >= 0.1 else 8
    toy = make_toy(folder)
    for layout in layouts:
        straight(toy, layout, *LONG)
        stopped = folder / f"stopped_{layout}"
        try:
            counts["stops"] += stop_again_and_again(toy, layout, stopped, every)
        except RuntimeError as error:
            failures.append(f"{layout}: {error}")
            continue
        compare_all(folder / f"straight_{layout}_{STOPS}_1", stopped, layout, counts, failures)
    counts |= reshards.run(budget, seed, folder / "reshards", failures)
    title = "a resumed run is the uninterrupted one; any layout to any"
    return Figures(goal="G5", title=title, counts=counts, failures=failures)


def stop_again_and_again(toy: Toy, layout: str, log_dir: Path, every: int) -> int:
    """Stops after every `every`-th step, then lets the run finish; how often it stopped."""
    stops = 0
    for step in range(every, STOPS, every):
        way = ("kill", "term", "stop file")[stops % 3]
        stop_after(toy, layout, log_dir, step, way)
        if max(checkpoints(log_dir), default=0) != step:
            raise RuntimeError(f"stopped by {way} after step {step}: no checkpoint of it")
        stops += 1
    with Live(toy, layout, log_dir, *LONG) as live:
        if live.wait(120) != 0:
            raise RuntimeError(f"does not finish: {live.describe()}")
    return stops


def stop_after(toy: Toy, layout: str, log_dir: Path, step: int, way: str) -> None:
    """One attempt that ends with the checkpoint of `step`."""
    if way == "kill":
        faults = f"step.begin@step={step + 1}:kill"
    elif way == "term":
        faults = f"step.compute@step={step},rank={step % 2 if layout != 'one' else 0}:term"
    else:
        # Rank 0 is slow enough in this step for the file to be there before its end.
        faults = f"step.compute@step={step},rank=0:sleep=0.1"
        (log_dir / "stop").touch()
    with Live(toy, layout, log_dir, *LONG, faults=faults) as live:
        status = live.wait(120)
        if status in (0, None):
            raise RuntimeError(f"stopped by {way} after step {step}: ended with {status}")


def compare_all(
    want: Path, got: Path, layout: str, counts: dict[str, int | float], failures: list[str]
) -> None:
    """Every checkpoint and every step of two runs."""
    there, wanted = checkpoints(got), checkpoints(want)
    for step, folder in wanted.items():
        difference = "missing"
        if step in there:
            difference = differing(tensors(there[step]), tensors(folder))
        if difference:
            failures.append(f"{layout}, checkpoint of step {step}: {difference}")
        counts["checkpoints equal"] += not difference
    if logged_steps(got) != list(range(1, STOPS + 1)):
        failures.append(f"{layout}: metrics.jsonl has the steps {logged_steps(got)}")
    numbers = training_numbers(got)
    for step, expected in training_numbers(want).items():
        if numbers.get(step) != expected:
            failures.append(f"{layout}, step {step}: {numbers.get(step)}, expected {expected}")
        counts["steps equal"] += numbers.get(step) == expected
