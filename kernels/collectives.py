"""Rows of hidden states between the ranks that share the vocabulary: gathered once in forward,
their gradients summed once in backward."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.gemm import add_product
from kernels.head import Chunk, Head


def gather_rows(hidden: Tensor, head: Head) -> Tensor:  # (N_rank, D) -> (N, D)
    """All ranks' rows in the order of ranks; `hidden` itself where every rank has all of them."""
    if head.row_splits is None:
        return hidden
    longest = max(head.row_splits)
    mine = hidden.contiguous()
    if len(mine) < longest:  # NCCL and gloo want equal sizes
        mine = hidden.new_zeros(longest, hidden.shape[1])
        mine[: len(hidden)] = hidden
    gathered = hidden.new_empty(len(head.row_splits), *mine.shape)
    dist.all_gather_single(gathered.flatten(0, 1), mine, group=head.tp_group)
    if longest == min(head.row_splits):
        return gathered.flatten(0, 1)
    return torch.cat([rows[:n] for rows, n in zip(gathered, head.row_splits, strict=True)])


class HiddenGradient:
    """dhidden (N, D): summed over chunks, then over ranks while other work goes on."""

    def __init__(self, hidden: Tensor, dtype: torch.dtype, head: Head):
        self.dtype, self.head = hidden.dtype, head
        # Not rounded before all chunks and ranks are in.
        self.grad = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
        self.is_empty = True
        self.work = None

    def add(self, chunk: Chunk) -> None:
        add_product(self.grad, chunk.dz, chunk.weight, accumulate=not self.is_empty, may_round=True)
        self.is_empty = False

    def start_reduction(self) -> None:
        group, splits = self.head.tp_group, self.head.row_splits
        if group is None:
            return
        if splits is None:
            self.work = dist.all_reduce(self.grad, group=group, async_op=True)
            return
        summands = self.grad
        if min(splits) != max(splits):
            summands = self.grad.new_zeros(len(splits), max(splits), self.grad.shape[1])
            for rank, part in enumerate(self.grad.split(list(splits))):
                summands[rank, : len(part)] = part
            summands = summands.flatten(0, 1)
        self.grad = summands.new_empty(max(splits), summands.shape[1])
        self.work = dist.reduce_scatter_single(self.grad, summands, group=group, async_op=True)

    def finish(self) -> Tensor:
        """The gradient of the rows that this rank brought, in their type."""
        if self.is_empty:  # no real vocab row here; the other ranks still wait for the sum
            self.grad.zero_()
            self.start_reduction()
        if self.work is not None:
            self.work.wait()
        if self.head.row_splits is not None:
            self.grad = self.grad[: self.head.row_splits[dist.get_rank(self.head.tp_group)]]
        return self.grad.to(self.dtype)
