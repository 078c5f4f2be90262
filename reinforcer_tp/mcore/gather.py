"""Rows of a tensor by index, with a backward that gives the same bits in every run.

Autograd's own backward of indexing adds with atomics on a GPU. Here the host splits the index into
levels, the first occurrence of each row, the second and so on; a level writes a row at most once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reinforcer_tp.data.packed_batch import move


@dataclass(frozen=True, kw_only=True)
class Gather:
    """Which rows to take, and how their gradient comes back."""

    index: Tensor  # (K,) int64
    # Per level, (rows, slots): `rows` (n,) int64, no row twice, and their places in `index`.
    copies: tuple[tuple[Tensor, Tensor], ...]

    def to(self, device: torch.device | str) -> Gather:
        """On `device`; copies to a GPU go through pinned memory and do not wait."""
        device = torch.device(device)
        copies = tuple((move(rows, device), move(slots, device)) for rows, slots in self.copies)
        return Gather(index=move(self.index, device), copies=copies)


def gather_plan(index: Tensor, is_real: Tensor | None = None) -> Gather:
    """The plan of `x[index]`, made on the host.

    `index` (K,) int64, not negative; `is_real` (K,) bool: slots where it is False are padding,
    whose gradient is dropped (None = all are real).
    """
    slots = torch.arange(len(index)) if is_real is None else is_real.nonzero().squeeze(1)
    rows, order = index[slots].sort(stable=True)
    slots = slots[order]
    # Equal rows stand together now, in the order of their slots: the place within such a run.
    place = torch.arange(len(rows))
    starts = torch.ones_like(rows, dtype=torch.bool)
    torch.ne(rows[1:], rows[:-1], out=starts[1:])
    level = place - torch.where(starts, place, 0).cummax(0).values
    num_levels = int(level.max()) + 1 if len(rows) else 0
    selections = [level == number for number in range(num_levels)]
    return Gather(index=index, copies=tuple((rows[at], slots[at]) for at in selections))


def gather_rows(x: Tensor, plan: Gather) -> Tensor:
    """`x[plan.index]`, (T, ...) -> (K, ...).

    Backward sums the gradients of a row's slots in the order of the slots, in x's dtype, without
    atomics: bitwise repeatable.
    """
    return _GatherRows.apply(x, plan)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, plan: Gather) -> Tensor:
        ctx.plan, ctx.num_rows = plan, len(x)
        return x.index_select(0, plan.index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        plan: Gather = ctx.plan
        shape = (ctx.num_rows, *grad.shape[1:])
        if not plan.copies:
            return grad.new_zeros(shape), None
        (rows, slots), *others = plan.copies
        is_complete = len(rows) == ctx.num_rows  # every row is written: nothing to zero
        total = grad.new_empty(shape) if is_complete else grad.new_zeros(shape)
        total.index_copy_(0, rows, grad.index_select(0, slots))
        for rows, slots in others:
            both = total.index_select(0, rows) + grad.index_select(0, slots)
            total.index_copy_(0, rows, both)
        return total, None
