"""Numbers that are not finite: the error, where they came from, and steps skipped for them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from reinforcer_tp.config_check import METRICS
from reinforcer_tp.data.packed_batch import PackedBatch
from reinforcer_tp.loss import sequence_sums
from reinforcer_tp.mcore.gradients import (
    Glance,
    backward_alone,
    glance_at_gradients,
    glance_at_own_part,
    glance_at_weights,
)
from reinforcer_tp.mcore.optim import Training
from reinforcer_tp.mcore.schedule import LossFunction, Stage
from reinforcer_tp.mcore.topology import Topology, any_rank

# A norm whose square may overflow once more ranks' and micro-batches' are added.
_LARGE_NORM = 1e15


class NonFiniteError(RuntimeError):
    """A number that is not finite; no weight has changed since the last step."""


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Why a step must not change the weights; alike on every rank."""

    step: int
    text: str  # what is not finite, and where
    can_skip: bool = True  # False: the next step would meet it again


@dataclass(kw_only=True)
class SkippedSteps:
    """The steps that were skipped; alike on every rank, saved with every checkpoint."""

    in_row: int = 0  # just now
    total: int = 0  # in the whole run

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, int]) -> "SkippedSteps":
        return cls(in_row=int(saved["in_row"]), total=int(saved["total"]))

    def skip(self, trouble: Trouble, dpo: Any) -> str:
        """Counts a step that changed no weight; a line about it. `dpo` is the config section.

        Raises NonFiniteError where dpo.on_nonfinite or dpo.max_nonfinite_steps ends the run.
        """
        text, limit = f"step {trouble.step}: {trouble.text}", dpo.max_nonfinite_steps
        if dpo.on_nonfinite == "skip" and trouble.can_skip and self.in_row < limit:
            self.in_row += 1
            self.total += 1
            return (
                f"{text}. Its batch is skipped, {self.in_row} in a row (at most {limit}: "
                f"dpo.max_nonfinite_steps), {self.total} in all"
            )
        if self.in_row:
            text += f". The {self.in_row} steps before it were skipped"
            if self.in_row >= limit:
                text += f", as many in a row as dpo.max_nonfinite_steps={limit} allows"
        if dpo.on_nonfinite == "skip" and not trouble.can_skip:
            text += ". The next step would meet it again, so dpo.on_nonfinite=skip does not help"
        advice = "lower policy.megatron_cfg.optimizer.lr, or look at the rows and at the model's"
        if dpo.on_nonfinite == "stop" and trouble.can_skip:
            advice = f"dpo.on_nonfinite=skip goes on without such batches; {advice}"
        untouched = f"The weights of step {trouble.step - 1} are untouched"
        raise NonFiniteError(f"{text}. {untouched}; {advice} weights")


def look_at_loss(
    step: int,
    sums: Mapping[str, float],  # of the global batch, on every rank
    reports: Sequence[Mapping[str, torch.Tensor]],
    batches: Sequence[PackedBatch],
    training: Training,
) -> Trouble | None:
    """Names rank, micro-batch, pair and side wherever a log-prob is not finite. Collective."""
    topology = training.topology
    is_bad = not all(np.isfinite(sums[name]) for name in METRICS)
    # The ranks of a tensor-parallel group each compute the loss, and one of them may be damaged.
    if not any_rank(is_bad, topology.tp_group, topology.device):
        return None
    local = [
        f"rank {topology.rank}, micro-batch {i}, {_culprits(report, batch)}"
        for i, (report, batch) in enumerate(zip(reports, batches, strict=False))
        if not all(np.isfinite(report[name].item()) for name in METRICS)
    ]
    is_loss = any_rank(not np.isfinite(sums["loss"]), dist.group.WORLD, topology.device)
    what = "the loss" if is_loss else "a log-prob"
    places = [place for part in _everyone(local, topology) for place in part]
    return _trouble(step, what, list(dict.fromkeys(places)), training)


def look_at_gradient(
    step: int,
    stage: Stage,
    training: Training,
    batches: Sequence[PackedBatch],
    loss_function: LossFunction,
) -> Trouble:
    """Names ranks, micro-batches and pairs of a gradient norm that is not finite. Collective.

    Each micro-batch is computed a second time, alone, without the data-parallel reduction.
    """
    topology = training.topology
    before = _everyone((glance_at_gradients(training), glance_at_own_part(training)), topology)
    found: list[tuple[int, tuple[int, ...], Glance]] = []
    for index, batch in enumerate(batches):
        backward_alone(stage, training, batches, index, loss_function)
        found.append((index, batch.rows, glance_at_gradients(training)))
    everyone = _everyone(found, topology)
    places = [place for index in range(len(batches)) for place in _places(index, everyone)]
    return _trouble(step, "the gradient norm", places or [_no_place(before, everyone)], training)


def loss_scale_trouble(step: int, training: Training, grad_norm: float) -> Trouble | None:
    """float16 only: None where halving the loss scale may help. Collective."""
    topology, scale = training.topology, float(training.optimizer.get_loss_scale())
    # A NaN is another rank's overflow: now the ranks' loss scales differ.
    if any_rank(bool(np.isnan(grad_norm)), topology.dp_group, topology.device):
        text = "the gradient overflows on some data-parallel replicas, which must hold the same one"
        return Trouble(step=step, text=text, can_skip=False)
    if scale > training.optimizer.config.min_loss_scale:
        return None
    text = f"the gradient overflows float16 at the smallest loss scale, {scale:g}"
    return Trouble(step=step, text=text, can_skip=False)


def _trouble(step: int, what: str, places: list[str], training: Training) -> Trouble:
    """With the weights that are to blame themselves, which skipping a batch does not mend."""
    ranks: dict[str, list[int]] = {}
    for g in _everyone(glance_at_weights(training), training.topology):
        if g.num_bad:
            text = f"{g.num_bad} of {g.num} weights are not finite, or too large to square, first "
            ranks.setdefault(text + g.first_bad, []).append(g.rank)
    weights = [f"{_ranks(those)}: {text}" for text, those in ranks.items()]
    more = [f"and {len(places) - 8} more places"] if len(places) > 8 else []
    where = "; ".join([*places[:8], *more, *weights])
    return Trouble(step=step, text=f"{what} is not finite ({where})", can_skip=not weights)


def _everyone(local: Any, topology: Topology) -> list[Any]:
    everyone: list[Any] = [None] * topology.world_size
    dist.all_gather_object(everyone, local)
    return everyone


def _places(index: int, everyone: list[list[tuple[int, tuple[int, ...], Glance]]]) -> list[str]:
    """Of micro-batch `index`, each data-parallel replica's of which is another batch."""
    by_rows: dict[tuple[int, ...], list[Glance]] = {}
    for part in everyone:
        _, rows, glance = part[index]
        if glance.num_bad:
            by_rows.setdefault(rows, []).append(glance)
    return [_place(index, rows, glances) for rows, glances in by_rows.items()]


def _place(index: int, rows: tuple[int, ...], glances: list[Glance]) -> str:
    origin = _origin(glances)
    others = sorted(glance.rank for glance in glances if glance not in origin)
    pairs = f"source rows {list(rows)}" if rows else "padding only"
    text = f"{_ranks([g.rank for g in origin])}, micro-batch {index}, {pairs}: {origin[0].num_bad} "
    text += f"of {origin[0].num} gradients are not finite, or too large to square, when they are "
    return text + "computed again" + (f", and some on {_ranks(others)}" if others else "")


def _origin(glances: Sequence[Glance]) -> list[Glance]:
    """Backward starts at the last chunk and only spreads: it began where most are bad in that."""
    most = max((glance.chunk, glance.num_bad) for glance in glances)
    return [glance for glance in glances if (glance.chunk, glance.num_bad) == most]


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _no_place(
    before: list[tuple[Glance, Glance | None]],
    everyone: list[list[tuple[int, tuple[int, ...], Glance]]],
) -> str:
    """Where no micro-batch has a bad gradient of its own, the second time."""
    norm, rank, index = max(
        (glance.norm, -glance.rank, -index) for part in everyone for index, _, glance in part
    )
    if norm > _LARGE_NORM:
        return (
            f"the sum over parameters, micro-batches and ranks overflows; the largest gradient, of "
            f"norm {norm:.1e}, is that of rank {-rank}, micro-batch {-index}"
        )
    # Whose hardware erred, as far as gradients show it that were reduced already.
    own = [part for _, part in before if part is not None and part.num_bad]
    reduced = [glance for glance, _ in before if glance.num_bad]
    text = "not again when every micro-batch is computed a second time: the hardware of "
    if not own and not reduced:
        return f"{text}some rank is suspect"
    return f"{text}{_one_of([glance.rank for glance in _origin(own or reduced)])} is suspect"


def _one_of(ranks: Sequence[int]) -> str:
    return _ranks(ranks) if len(ranks) == 1 else f"one of the {_ranks(ranks)}"


def _culprits(report: Mapping[str, torch.Tensor], batch: PackedBatch) -> str:
    policy = report["sequence_logps"]
    of, sides = "log-probs", _bad_sides(policy, batch)
    if not sides and batch.reference_logps is not None:
        batch = batch.to("cpu")  # those of a resident reference are on the device
        sums = sequence_sums(batch.reference_logps, batch.sequence_id, len(policy))
        of, sides = "the reference's log-probs", _bad_sides(sums, batch)
    if not sides:
        return f"log-probs are finite in source rows {list(batch.rows)}, the loss is not"
    more = f" and {len(sides) - 4} more" if len(sides) > 4 else ""
    return f"{of} of {', '.join(sides[:4])}{more}"


def _bad_sides(sums: torch.Tensor, batch: PackedBatch) -> list[str]:  # sums (2B,)
    is_bad = (~sums.isfinite()).view(-1, 2).tolist()
    return [
        f"source row {row} {side}"
        for row, bad in zip(batch.rows, is_bad, strict=True)
        for side, is_bad_side in zip(("chosen", "rejected"), bad, strict=True)
        if is_bad_side
    ]
