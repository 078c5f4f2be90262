"""G8: SIGTERM, SIGUSR1 and SIGINT at random instants, to one rank or to all.

Every rank ends with 75 (0 where the run was done), at most one finished step is lost, and the same
command ends with the weights of a run that was never asked to stop.
"""

import random
import signal
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.figures import Figures
from tests.faults.runs import (
    WHO,
    Finished,
    Live,
    Toy,
    checkpoints,
    compare,
    damage,
    logged_steps,
    make_toy,
    send,
    straight,
)

SIGNALS = 200
SIGNALS_A_RUN = 5
LAYOUTS = ("dp2", "tp2", "pp2")
NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")
RARELY = ("checkpointing.save_period=100",)  # what is saved is saved because of the signal
ENDS_S = 20.0
DONE, REQUEUE = 0, 75


@dataclass
class Ledger:
    signals: int = 0
    lost: int = 0  # finished steps that had to be done again, at most by one signal
    stopped: int = 0  # signals that ended a run
    finished: int = 0
    longest_s: float = 0.0
    failures: list[str] = field(default_factory=list)


def run(budget: float, seed: int, folder: Path) -> Figures:
    """Budget 1.0: 200 signals in three layouts."""
    source, ledger = random.Random(seed), Ledger()
    toy = make_toy(folder)
    wanted = max(5, round(SIGNALS * budget))
    layouts = LAYOUTS if budget >= 0.05 else (source.choice(LAYOUTS),)
    want = {layout: straight(toy, layout, *RARELY) for layout in layouts}
    number = 0
    while ledger.signals < wanted and len(ledger.failures) <= 20:
        layout = layouts[number % len(layouts)]
        count = min(wanted - ledger.signals, SIGNALS_A_RUN)
        log_dir = folder / f"signals_{number}"
        signal_at_random(toy, layout, want[layout], log_dir, source, count, ledger)
        number += 1
    return Figures(
        goal="G8",
        title="a signal loses at most a step and gives the right code",
        counts={
            "signals": ledger.signals,
            "stopped": ledger.stopped,
            "runs finished bit-equal": ledger.finished,
            "most steps lost": ledger.lost,
            "longest end, s": ledger.longest_s,
        },
        failures=ledger.failures,
    )


def signal_at_random(
    toy: Toy,
    layout: str,
    want: Finished,
    log_dir: Path,
    source: random.Random,
    count: int,
    ledger: Ledger,
) -> None:
    """One run, sent up to `count` signals over several attempts, then finished."""
    for _ in range(count):
        who, kind = source.choice(list(WHO)), source.choice(NAMES)
        instant_s = source.uniform(0.05, want.seconds)
        name = f"{log_dir.name} {layout} {kind} to {who} after {instant_s:.2f} s"
        with Live(toy, layout, log_dir, *RARELY) as live:
            if live.wait(instant_s) is not None:
                break
            pids = live.ranks()
            if len(pids) < live.nproc:
                continue
            before = max(checkpoints(log_dir), default=0)
            send([pids[rank] for rank in WHO[who]], getattr(signal, kind))
            ledger.signals += 1
            look(live, name, before, ledger)
    with Live(toy, layout, log_dir, *RARELY) as live:
        if live.wait(120) != 0:
            ledger.failures.append(f"{log_dir.name} {layout}: does not finish: {live.describe()}")
            return
    wrong = compare(log_dir, want, training_only=True)  # a stopped step is not validated
    ledger.finished += not wrong
    ledger.failures += [f"{log_dir.name} {layout}: {what}" for what in wrong]


def look(live: Live, name: str, before: int, ledger: Ledger) -> None:
    """The end of one attempt: how soon, with which codes, and what it kept."""
    began = live.seconds()
    status, alive = live.wait(ENDS_S), live.survivors()
    ledger.longest_s = max(ledger.longest_s, live.seconds() - began)
    if status is None or alive:
        late = f"{len(alive)} processes are alive {ENDS_S:.0f} s later"
        ledger.failures.append(f"{name}: {late}: {live.describe()}")
        return
    codes = set(live.codes().values())
    ledger.stopped += codes != {DONE}
    if not codes <= {DONE, REQUEUE}:
        ledger.failures.append(f"{name}: exit codes {live.codes()}: {live.describe()}")
    found = checkpoints(live.log_dir)
    newest, last = max(found, default=0), max(logged_steps(live.log_dir), default=0)
    lost = max(0, last - newest)
    ledger.lost = max(ledger.lost, lost)
    if lost > 1 or newest < before:
        ledger.failures.append(f"{name}: step {last} was done, the newest checkpoint is {newest}")
    wrong = [text for text in map(damage, found.values()) if text]
    ledger.failures += [f"{name}: {text}" for text in wrong]
