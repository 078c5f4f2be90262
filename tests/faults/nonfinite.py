"""G6: numbers that are not finite, put into a tiny run anywhere, change no weight and are named.

An injection is drawn at random: the layout, rank, step, micro-batch, tensor, element and value.
Ranks draw alike from one seed; the rank it falls on alone chooses the place in its own data.
"""

import random
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tests.distributed.layouts import judge
from tests.distributed.nonfinite_ranks import LAYOUTS
from tests.distributed.spawn import run_distributed
from tests.faults.figures import Figures

TOTAL = 200
RUNS = ("one", "tp2", "tp2_sp", "pp2", "vpp2", "dp2", "dp2_sharded")  # float16 has its own tests
KINDS = {  # what is poisoned -> the values it may take
    "logps": ("nan", "inf", "-inf"),
    "reference": ("nan", "inf", "-inf"),
    "gradient": ("nan", "inf", "-inf", "huge"),
    "passing": ("nan", "inf", "-inf"),  # a gradient, once: computed again it is fine
    "reduced": ("nan", "inf", "-inf"),  # a gradient after the data-parallel reduction
    "weight": ("nan", "inf", "-inf"),
}
# The next forward gathers a shard's weights anew, and its optimizer reads its own gradients only.
NOT_SHARDED = ("weight", "reduced")
# There the reduction leaves no trace of which rank's gradient it was.
BLURRED = ("tp2_sp", "dp2")
_PLACE = re.compile(r"rank (\d+), micro-batch (\d+),")


@dataclass
class Outcome:
    """One injection, as one rank saw it."""

    what: str  # for the report
    expected: list[str]  # the text must hold these; known to the injected rank only
    place: tuple[int, int] | None  # (rank, micro-batch), where no other may be named
    text: str
    changed: list[str]  # names of what is not as it was, bit for bit


def run(budget: float, seed: int, folder: Path) -> Figures:
    """`budget` 1.0 = 200 injections."""
    begin = time.monotonic()
    model = judge("four", folder / "model")["folder"]
    total = max(round(TOTAL * budget), len(RUNS))
    plan = {name: total // len(RUNS) + (i < total % len(RUNS)) for i, name in enumerate(RUNS)}
    failures: list[str] = []
    for world in (1, 2):
        names = {name: n for name, n in plan.items() if LAYOUTS[name][0] == world}
        ranks = run_distributed(_inject_all, world, names, model, seed, timeout_s=600)
        for outcomes in zip(*ranks, strict=True):
            failures += _failures(outcomes)
    counts = {
        "injections": total,
        "weights changed": sum("changed" in failure for failure in failures),
        "not named": sum("named" in failure for failure in failures),
        "seconds": time.monotonic() - begin,
    }
    return Figures("G6", "NaN and Inf change no weight and are named", counts, failures)


def _failures(outcomes: tuple[Outcome, ...]) -> list[str]:
    what, texts = outcomes[0].what, {outcome.text for outcome in outcomes}
    found = [
        f"{what}: changed on rank {rank}: {outcome.changed[:3]}"
        for rank, outcome in enumerate(outcomes)
        if outcome.changed
    ]
    if len(texts) > 1:
        found.append(f"{what}: ranks say different things, named unlike: {sorted(texts)}")
    text = outcomes[0].text
    for outcome in outcomes:
        found += [f"{what}: not named {e!r}: {text!r}" for e in outcome.expected if e not in text]
        places = {(int(rank), int(index)) for rank, index in _PLACE.findall(text)}
        if outcome.place is not None and places != {outcome.place}:
            found.append(f"{what}: named {sorted(places)}, expected {outcome.place}: {text!r}")
    return found


def _inject_all(plan: dict[str, int], model: str, seed: int) -> list[Outcome]:
    """In a spawned rank."""
    from tests.distributed import layouts

    layouts._groups.clear()
    return [o for name, n in plan.items() for o in _inject_into(name, n, model, seed)]


def _inject_into(name: str, count: int, model: str, seed: int) -> list[Outcome]:
    from tests.distributed.nonfinite_ranks import last_stage_ranks, open_run, try_step

    draw = random.Random(f"{seed} {name}")
    stops = open_run(name, model)
    skips = replace(stops, config=_skipping(stops.config))
    last, outcomes, step = last_stage_ranks(stops), [], 0
    kinds = [kind for kind in KINDS if not (LAYOUTS[name][4] and kind in NOT_SHARDED)]
    draw.shuffle(kinds)
    for number in range(count):
        for _ in range(draw.randrange(2) if step else 1):  # moments, and that it goes on
            step += 1
            text, metrics = try_step(stops, step)
            assert not text and metrics["train/grad_norm"] > 0, (name, step, text)
        step += 1
        run = draw.choice((stops, skips))
        run.skips.in_row = 0
        outcomes.append(_inject(run, name, step, kinds[number % len(kinds)], last, draw))
    return outcomes


def _skipping(config):
    return replace(config, dpo=replace(config.dpo, on_nonfinite="skip"))


def _inject(run, name: str, step: int, kind: str, last: list[int], draw: random.Random) -> Outcome:
    """Collective; every rank draws as many numbers."""
    from tests.distributed.nonfinite_ranks import state, try_step

    topology = run.stage.topology
    ranks = last if kind in ("logps", "reference") else range(topology.world_size)
    rank, value, number = draw.choice(ranks), draw.choice(KINDS[kind]), draw.randrange(2**31)
    outcome = Outcome(f"{name}, step {step}, {kind} of rank {rank}: {value}", [], None, "", [])
    fault = weight = None
    if topology.rank == rank and kind == "weight":
        weight = _poison_weight(run, value, number, outcome)
    elif topology.rank == rank:
        fault = _fault(run, step, kind, value, number, outcome, name not in BLURRED)
    before = state(run)
    outcome.text, metrics = try_step(run, step, fault)
    after = state(run)
    outcome.changed = [n for n in before if before[n] != after.get(n)]
    if weight is not None:
        weight[0][weight[1]] = weight[2]
    if kind != "weight" and (run.config.dpo.on_nonfinite == "skip") != bool(metrics):
        outcome.expected.append("its batch is skipped" if not metrics else "an error")
    if f"step {step}: " not in outcome.text:
        outcome.expected.append(f"step {step}: ")
    return outcome


def _poison_weight(run, value: str, number: int, outcome: Outcome):
    """(flat weights, index, what stood there). Not of an embedding: its row may not be read."""
    from tests.distributed.nonfinite_ranks import parameters

    layers = [(n, p) for _, n, p in parameters(run) if "embedding" not in n and "output" not in n]
    where, parameter = layers[number % len(layers)]
    flat = parameter.data.view(-1)
    index = number % flat.numel()
    saved = flat[index].clone()
    flat[index] = float(value)
    outcome.expected = [f"rank {run.stage.topology.rank}: 1 of ", where]
    return flat, index, saved


def _fault(
    run, step: int, kind: str, value: str, number: int, outcome: Outcome, is_known: bool
) -> str:
    """The text that arms it on this rank; says in `outcome` what must be named.

    `is_known`: reduced gradients still show whose own one was not finite.
    """
    from tests.distributed.nonfinite_ranks import micro_batches_of

    rank = run.stage.topology.rank
    batches = [(i, b) for i, b in enumerate(micro_batches_of(run, step)) if b.rows]
    index, batch = batches[number % len(batches)]
    place, where = f"rank {rank}, micro-batch {index}, ", f"step={step},row={batch.rows[0]}"
    if kind == "reduced":
        outcome.expected = [f"the hardware of rank {rank} is suspect"]
        return f"nonfinite.reduced@step={step}:{value}={number}"
    if kind == "passing":
        one_of = f"rank {rank}" if is_known else "one of the ranks 0, 1"
        outcome.expected = [f"the hardware of {one_of} is suspect"]
        return f"nonfinite.gradient@{where},hit=1:{value}={number}"
    outcome.place = rank, index
    if kind == "gradient":
        outcome.expected = [f"{place}source rows {list(batch.rows)}"]
        return f"nonfinite.gradient@{where}:{value}={number}"
    sequence = int(batch.sequence_id[number % len(batch.sequence_id)])
    of = "log-probs" if kind == "logps" else "the reference's log-probs"
    side = ("chosen", "rejected")[sequence % 2]
    outcome.expected = [f"{place}{of} of source row {batch.rows[sequence // 2]} {side}"]
    return f"nonfinite.{kind}@{where}:{value}={number}"
