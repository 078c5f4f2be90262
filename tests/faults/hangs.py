"""G7: a rank that is stopped, loops for ever or leaves out a collective is named, and all end.

The clock starts when the rank stands still; the line that names it must be there, and every process
gone, within cluster.hang_timeout_s and two seconds.
"""

import itertools
import json
import random
import re
import time
from pathlib import Path

from tests.faults.figures import Figures
from tests.faults.runs import Live, Toy, logged_steps, make_toy, straight

HANGS = 100
ENDS_S = 4.0  # after the name: a rank that does not leave by itself is killed
TIMEOUT_S, GRACE_S = 4.0, 2.0  # a loaded machine may take seconds for a step
LAYOUTS = ("dp2", "tp2", "pp2")
IN_STEPS = (
    *("step.begin", "step.compute", "step.optimizer.before", "step.optimizer.after", "step.end"),
    "validation",
)
BY_BOTH = ("ckpt.shard.open", "ckpt.shard.mid", "ckpt.shard.close", "export.folder")
# A stopped process is noticed everywhere; one that loops where files are written may be slow. The
# collective that is left out is the one in which all agree whether to stop.
KINDS = {"stop": IN_STEPS + BY_BOTH, "loop": IN_STEPS, "skip": ("step.end",)}
NAMED = re.compile(r"lost rank (\d+), last step (\d+|none), last phase (\w+)")
REQUEUE = 75


def run(budget: float, seed: int, folder: Path) -> Figures:
    """Budget 1.0: 100 hangs at random points, of each kind and rank, in three layouts."""
    source, failures, named_s, ended_s = random.Random(seed), [], [], []
    toy = make_toy(folder)
    count = max(3, round(HANGS * budget))
    layouts = LAYOUTS if budget >= 0.05 else (source.choice(LAYOUTS),)
    places = list(itertools.product((0, 1), layouts))
    source.shuffle(places)
    for layout in layouts:  # which fills the store of reference log-probs
        straight(toy, layout)
    cases = itertools.cycle((kind, *place) for place in places for kind in KINDS)
    for number, (kind, rank, layout) in enumerate(itertools.islice(cases, count)):
        point = source.choice(KINDS[kind])
        step = {"validation": 6, "export.folder": 12}.get(point, source.randint(2, 9))
        step = 3 * max(1, step // 3) if point.startswith("ckpt") else step
        name = f"{kind} at {point}, step {step}, rank {rank}, {layout}"
        fault = f"{point}@rank={rank},step={step}:{kind}"
        hang(toy, layout, folder / f"hang_{number}", fault, rank, name, failures, named_s, ended_s)
    return Figures(
        goal="G7",
        title=f"a hanging rank is named within {TIMEOUT_S:g} + {GRACE_S:g} s, all processes end",
        counts={
            "hangs": count,
            "named in time": len(named_s),
            "longest until named, s": max(named_s, default=0.0),
            "longest until all ended, s": max(ended_s, default=0.0),
        },
        failures=failures,
    )


def hang(
    toy: Toy,
    layout: str,
    log_dir: Path,
    fault: str,
    rank: int,
    name: str,
    failures: list[str],
    named_s: list[float],
    ended_s: list[float],
) -> None:
    with Live(toy, layout, log_dir, f"cluster.hang_timeout_s={TIMEOUT_S}", faults=fault) as live:
        point, _, kind = fault.partition("@")[0], *fault.rpartition(":")[1:]
        if not said(live, re.compile(f"warning: {kind} at {re.escape(point)}"), 120):
            failures.append(f"{name}: not reached: {live.describe()}")
            return
        began, done = time.monotonic(), max(logged_steps(log_dir), default=0)
        limit_s = TIMEOUT_S + GRACE_S
        found = said(live, NAMED, 3 * limit_s)
        seconds = time.monotonic() - began
        live.wait(max(0.0, 3 * limit_s - seconds))
        ended = time.monotonic() - began
        alive = live.survivors(0.5)
    wrong = []
    if not found:
        wrong.append(f"nobody is named: {live.describe()}")
    elif found[1] != str(rank) or abs(int(found[2].replace("none", "0")) - done) > 1:
        wrong.append(f"after step {done} it says {found[0]}")
    elif seconds > limit_s:
        wrong.append(f"named after {seconds:.1f} s")
    else:
        named_s.append(seconds)
    if alive or ended > limit_s + ENDS_S:
        wrong.append(f"{len(alive)} processes left, ended after {ended:.1f} s")
    ended_s.append(ended)
    if (code := exit_code(log_dir)) != REQUEUE:
        wrong.append(f"exit.json has code {code}")
    failures += [f"{name}: {what}" for what in wrong]


def said(live: Live, pattern: re.Pattern, timeout_s: float) -> re.Match | None:
    """The pattern's match in what the run says on stderr, waiting for it."""
    deadline = time.monotonic() + timeout_s
    while not (found := pattern.search(live.stderr)):
        if time.monotonic() > deadline or live.process.poll() is not None:
            return pattern.search(live.stderr)
        time.sleep(0.01)
    return found


def exit_code(log_dir: Path) -> int | None:
    """Of the newest attempt, by its exit.json."""
    attempts = sorted((log_dir / "attempts").glob("[0-9]*"))
    path = attempts[-1] / "exit.json" if attempts else None
    return json.loads(path.read_text())["code"] if path is not None and path.exists() else None
