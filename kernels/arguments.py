"""Checks of the operator's arguments: what, got, expected."""

from __future__ import annotations

import math
from numbers import Integral

import torch
import torch.distributed as dist
from torch import Tensor


def check_operands(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}"
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or hidden.shape[1] == 0
    ):
        raise ValueError(f"{shapes}; expected (N, D) and (V, D) with D > 0")
    floats = [t for t in (hidden, weight, bias) if t is not None]
    if not all(t.is_floating_point() for t in floats):
        raise ValueError(f"got {[str(t.dtype) for t in floats]}; expected floating point")
    if len({t.device for t in (*floats, labels)}) > 1:
        raise ValueError(f"got {[str(t.device) for t in (*floats, labels)]}; expected one device")
    if labels.dim() != 1 or labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"labels {tuple(labels.shape)} {labels.dtype}; expected (N,) int64 or int32"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)}; expected ({len(weight)},)")


def checked_vocab(
    vocab_start: int | None, vocab_size: int | None, num_rows: int, sharded: bool
) -> tuple[int, int]:
    if sharded and (vocab_size is None or vocab_start is None):
        raise ValueError(
            f"vocab_start is {vocab_start}, vocab_size is {vocab_size}; with a tp_group give the "
            "id of this rank's first row and the size of the whole vocabulary"
        )
    vocab_start = 0 if vocab_start is None else vocab_start
    vocab_size = num_rows if vocab_size is None else vocab_size
    if vocab_size < 1 or vocab_start < 0:
        raise ValueError(f"vocab_size={vocab_size}, vocab_start={vocab_start}; expected >= 1, >= 0")
    if not sharded and (vocab_start != 0 or vocab_size > num_rows):
        raise ValueError(
            f"vocab_start={vocab_start}, vocab_size={vocab_size} with {num_rows} weight rows "
            "and no tp_group; expected vocab_start=0 and every real row; pass tp_group for a shard"
        )
    return vocab_start, vocab_size


def check_options(temperature, logit_softcap, cache_budget_bytes) -> None:
    options = [temperature] if logit_softcap is None else [temperature, logit_softcap]
    if not all(option > 0 and math.isfinite(option) for option in options):
        raise ValueError(
            f"temperature={temperature}, logit_softcap={logit_softcap}; expected finite numbers "
            "above 0"
        )
    if not isinstance(cache_budget_bytes, Integral) or cache_budget_bytes < 0:
        raise ValueError(f"cache_budget_bytes={cache_budget_bytes!r}; expected an int >= 0")


def check_rows(hidden: Tensor, labels: Tensor, row_splits, tp_group) -> None:
    """`hidden` has the rows that this rank should bring."""
    rank, size = (dist.get_rank(tp_group), dist.get_world_size(tp_group)) if tp_group else (0, 1)
    if row_splits is None:
        expected = len(labels)
    elif len(row_splits) != size or sum(row_splits) != len(labels) or min(row_splits) < 0:
        raise ValueError(
            f"row_splits={list(row_splits)} with {len(labels)} labels and {size} ranks; expected "
            "the rows of each rank, together one for each label"
        )
    else:
        expected = row_splits[rank]
    if len(hidden) != expected:
        raise ValueError(
            f"hidden has {len(hidden)} rows; expected {expected} for {len(labels)} labels and "
            f"row_splits={row_splits}"
        )


def check_label_range(labels: Tensor, vocab_size: int) -> None:
    if not labels.numel():
        return
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ValueError(
            f"label {bad} is outside the vocabulary of {vocab_size} ids; pass only rows with "
            "a real label (response tokens; there is no ignore index)"
        )
