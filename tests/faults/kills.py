"""G1: SIGKILL at random instants and at every write; the same command then finishes the run.

After each kill: the others end, nothing that bears a checkpoint's name is torn, and the newest
checkpoint is at most one interval old. After the last: weights, moments, export and metrics are
those of an uninterrupted run, bit for bit.
"""

import itertools
import random
import signal
from dataclasses import dataclass, field
from pathlib import Path

from reinforcer_tp.faultpoints import FAULT_POINTS
from tests.faults.figures import Figures
from tests.faults.runs import (
    PERIOD,
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
    wait_until_stopped,
)

KILL_LAYOUTS = ("dp2", "tp2", "pp2")
RANDOM_KILLS, KILLS_A_RUN = 1000, 5
ENDS_S = 20.0  # the others of a killed rank are gone after this
FINISHES_S = 120.0
# A run that is killed at all of them in turn. Some finish a checkpoint, so it gets further; where
# rank 1 is killed, rank 0 may finish what it was held in. Hence many steps.
POINT_RUN = ("dpo.max_num_steps=90",)
ORDER = (
    "run.config",
    *("step.begin", "step.compute", "step.optimizer.before", "step.optimizer.after", "step.end"),
    *("ckpt.begin", "ckpt.folder", "ckpt.shard.open", "ckpt.shard.mid", "ckpt.shard.close"),
    *("ckpt.state", "ckpt.manifest.open", "ckpt.manifest.mid", "ckpt.manifest.close"),
    *("ckpt.rename.before", "ckpt.rename.after", "load.begin", "load.shard", "load.end"),
    *("validation", "ckpt.prune.rename", "ckpt.prune.delete", "export.folder", "export.rename"),
)
# Only rank 0 passes these: it is held there while the other is killed.
OF_RANK_ZERO = {
    "run.config",
    "ckpt.begin",
    "ckpt.folder",
    "ckpt.state",
    "ckpt.manifest.open",
    "ckpt.manifest.mid",
    "ckpt.manifest.close",
    "ckpt.rename.before",
    "ckpt.rename.after",
    "ckpt.prune.rename",
    "ckpt.prune.delete",
    "export.rename",
}


@dataclass(frozen=True)
class Case:
    point: str
    layout: str
    who: str


@dataclass
class Ledger:
    """What was done and what went wrong, over all runs."""

    kills: int = 0
    points: set[Case] = field(default_factory=set)
    resumes: int = 0
    finished: int = 0
    bit_equal: int = 0
    torn: int = 0
    orphans: int = 0
    longest_end_s: float = 0.0
    failures: list[str] = field(default_factory=list)

    def fail(self, case: str, what: str) -> None:
        self.failures.append(f"{case}: {what}")


def cases() -> list[Case]:
    """Every fault point, killed in every layout by every rank."""
    return [Case(*parts) for parts in itertools.product(ORDER, KILL_LAYOUTS, WHO)]


def run(budget: float, seed: int, folder: Path) -> Figures:
    """Budget 1.0: 1,000 random kills and every point; always every point at least once."""
    source, ledger = random.Random(seed), Ledger()
    toy = make_toy(folder)
    chains = point_chains(budget, source)
    layouts = {chain[0].layout for chain in chains}
    want = {layout: straight(toy, layout, *POINT_RUN) for layout in layouts}
    for number, chain in enumerate(chains):
        kill_at_points(toy, want, folder / f"points_{number}", chain, ledger)
    wanted = max(6, round(RANDOM_KILLS * budget))
    layouts = source.sample(KILL_LAYOUTS, 1 if budget < 0.05 else len(KILL_LAYOUTS))
    want = {layout: straight(toy, layout) for layout in layouts}
    for number in itertools.count():
        if ledger.kills - len(ledger.points) >= wanted or len(ledger.failures) > 20:
            break
        layout = layouts[number % len(layouts)]
        left = wanted - (ledger.kills - len(ledger.points))
        log_dir = folder / f"random_{number}"
        kill_at_random(toy, layout, want[layout], log_dir, source, min(left, KILLS_A_RUN), ledger)
    return Figures(
        goal="G1",
        title="killed runs resume alone and end bit-equal",
        counts={
            "random kills": ledger.kills - len(ledger.points),
            "kills at points": len(ledger.points),
            "points": len({case.point for case in ledger.points}),
            "resumed": ledger.resumes,
            "runs finished": ledger.finished,
            "bit-equal": ledger.bit_equal,
            "torn checkpoints": ledger.torn,
            "orphans": ledger.orphans,
            "longest end of the others, s": ledger.longest_end_s,
        },
        failures=ledger.failures,
    )


def point_chains(budget: float, source: random.Random) -> list[list[Case]]:
    """Chains of cases, each for one run directory; a small budget is one chain of mixed ranks."""
    chains = [[Case(point, *parts) for point in ORDER] for parts in _layouts_and_ranks()]
    wanted = round(len(chains) * budget)
    if wanted >= 1:
        return source.sample(chains, wanted)
    layout = source.choice(KILL_LAYOUTS)
    return [[Case(point, layout, source.choice(list(WHO))) for point in ORDER]]


def _layouts_and_ranks() -> list[tuple[str, str]]:
    return list(itertools.product(KILL_LAYOUTS, WHO))


def kill_at_points(
    toy: Toy, want: dict[str, Finished], log_dir: Path, chain: list[Case], ledger: Ledger
) -> None:
    """One run, killed at each point of the chain in turn, then finished."""
    assert set(ORDER) == set(FAULT_POINTS)
    newest: int | None = None
    layout = chain[0].layout
    for case in chain:
        name = f"{case.point} {case.layout} {case.who}"
        with Live(toy, layout, log_dir, *POINT_RUN, faults=armed(case)) as live:
            if not killed_there(live, case):
                ledger.fail(name, f"not reached: exit {live.wait(0)}; {live.describe()}")
                return
            ledger.kills += 1
            ledger.points.add(case)
            newest = aftermath(live, name, newest, ledger)
    name = f"{log_dir.name} {layout}"
    finish(toy, layout, log_dir, want[layout], name, newest, ledger, *POINT_RUN)


def armed(case: Case) -> str:
    """What stops the ranks at the point; the runner kills them there."""
    ranks = (0,) if case.point in OF_RANK_ZERO else WHO[case.who]
    return ";".join(f"{case.point}@rank={rank},hit=1:stop" for rank in ranks)


def killed_there(live: Live, case: Case) -> bool:
    """Waits until the ranks stand at the point and kills; False when they do not come so far."""
    ranks = (0,) if case.point in OF_RANK_ZERO else WHO[case.who]
    pids: list[int] = []
    for rank in ranks:
        # The second may wait for the first, which stands still: then both are as far as they get.
        timeout_s = 3.0 if pids else FINISHES_S
        pids = wait_until_stopped(live, rank, timeout_s) or pids
    if not pids:
        return False
    send([pids[rank] for rank in WHO[case.who]], signal.SIGKILL)
    send(pids, signal.SIGCONT)
    return True


def kill_at_random(
    toy: Toy,
    layout: str,
    want: Finished,
    log_dir: Path,
    source: random.Random,
    kills: int,
    ledger: Ledger,
) -> None:
    """One run, killed up to `kills` times at random instants, then finished."""
    newest: int | None = None
    extra = (f"checkpointing.async_save={str(source.random() < 0.3).lower()}",)
    for _ in range(kills):
        who, instant_s = source.choice(list(WHO)), source.uniform(0, want.seconds)
        name = f"{log_dir.name} {layout} {who} after {instant_s:.2f} s"
        with Live(toy, layout, log_dir, *extra) as live:
            if live.wait(instant_s) is not None:  # it was done sooner
                resumed_where(live, name, newest, ledger)
                newest = max(checkpoints(log_dir), default=None)
                break
            pids = live.ranks()
            if len(pids) < live.nproc:
                continue  # before both are forked, or after one has ended
            send([pids[rank] for rank in WHO[who]], signal.SIGKILL)
            ledger.kills += 1
            newest = aftermath(live, name, newest, ledger)
    finish(toy, layout, log_dir, want, f"{log_dir.name} {layout}", newest, ledger, *extra)


def aftermath(live: Live, name: str, before: int | None, ledger: Ledger) -> int | None:
    """Looks at what a kill has left; the step of the newest checkpoint."""
    began = live.seconds()
    status = live.wait(ENDS_S)
    alive = live.survivors()
    ledger.longest_end_s = max(ledger.longest_end_s, live.seconds() - began)
    if status is None or alive:
        ledger.orphans += len(alive)
        late = f"{len(alive)} processes are alive {ENDS_S:.0f} s after the kill"
        ledger.fail(name, f"{late}: {live.describe()}")
    if "Traceback" in live.stderr:
        ledger.fail(name, f"a traceback: {live.describe()}")
    resumed_where(live, name, before, ledger)
    found = checkpoints(live.log_dir)
    for folder in found.values():
        if wrong := damage(folder):
            ledger.torn += 1
            ledger.fail(name, f"torn: {wrong}")
    newest = max(found, default=None)
    last = max(logged_steps(live.log_dir), default=0)
    # A save in the background may not be done when the next is due.
    late = 2 * PERIOD if "async_save=true" in " ".join(live.process.args) else PERIOD
    if last - (newest or 0) > late:
        ledger.fail(name, f"step {last} was done, the newest checkpoint is of step {newest}")
    if before is not None and (newest or 0) < before:
        ledger.fail(name, f"the newest checkpoint was of step {before}, now of step {newest}")
    return newest


def resumed_where(live: Live, name: str, newest: int | None, ledger: Ledger) -> None:
    """A run that has begun to train did so from the newest checkpoint of before."""
    start = live.start_step()
    if start is not None:
        ledger.resumes += 1
        if start != newest:
            ledger.fail(name, f"went on from step {start}, the newest checkpoint was of {newest}")


def finish(
    toy: Toy,
    layout: str,
    log_dir: Path,
    want: Finished,
    name: str,
    newest: int | None,
    ledger: Ledger,
    *extra: str,
) -> None:
    """The same command without help; then everything is as if nothing had happened."""
    with Live(toy, layout, log_dir, *extra) as live:
        status = live.wait(FINISHES_S)
        if status != 0:
            ledger.fail(name, f"the last run ended with {status}: {live.describe()}")
            return
        if live.start_step() is None and newest not in (None, max(want.numbers)):
            ledger.fail(name, f"did not go on from step {newest}")
        resumed_where(live, name, newest, ledger)
    ledger.finished += 1
    wrong = compare(log_dir, want)
    left = [p.name for p in (log_dir / "checkpoints").iterdir() if not p.name.startswith("step_")]
    if left:
        wrong.append(f"left behind: {left}")
    for difference in wrong:
        ledger.fail(name, difference)
    ledger.bit_equal += not wrong
