"""Rows of a global batch, and the tensors of one packed micro-batch.

Legend: B pairs, S = 2B sequences, G segments, T tokens of the packed row, N response tokens.

Everything here runs on the host and is a pure function of its arguments, so each rank can compute
any rank's part and a resumed run continues exactly where the first one stopped.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from reinforcer_tp.data.prepare import TokenizedPair


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One packed micro-batch; every index is made on the host, so a step never synchronises.

    Sequence 2i is the chosen and 2i + 1 the rejected side of local pair i.
    """

    tokens: Tensor  # (T,) int64, padding is token 0
    position_ids: Tensor  # (T,) int64, restart at 0 in every segment
    cu_seqlens_q: Tensor  # (G + 1,) int32, segment borders; padding is one segment of its own
    cu_seqlens_kv: Tensor  # (G + 1,) int32
    kv_index: Tensor | None  # (K,) positions of the keys; None = the tokens in their order
    max_seqlen_q: int  # tokens of the longest segment
    max_seqlen_kv: int
    response_index: Tensor  # (N,) int64, positions whose next token is a response token
    labels: Tensor  # (N,) int64, that next token
    sequence_id: Tensor  # (N,) int64 in [0, 2B), never decreasing
    reference_logps: Tensor | None  # (N,) float32
    response_lengths: Tensor  # (2B,) int64, response tokens of each sequence
    pair_weights: Tensor  # (B,) float32
    rows: tuple[int, ...]  # (B,) rows in the source
    num_pairs: int  # pairs of weight > 0: what the loss is normalised by
    num_tokens: int  # real tokens, padding not counted

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on `device`; copies to a GPU go through pinned memory and do not wait."""
        return _tensors_to(self, torch.device(device))


@dataclass(frozen=True, kw_only=True)
class ResponseRows:
    """The response tokens whose positions lie in one of the even parts of a packed row."""

    index: Tensor  # (n,) int64, positions within the part
    splits: tuple[int, ...]  # n of each part, N in all
    order: Tensor | None  # (N,) int64, the tokens part by part; None = they are in that order
    inverse: Tensor | None  # (N,) int64, undoes `order`

    def to(self, device: torch.device | str) -> ResponseRows:
        return _tensors_to(self, torch.device(device))


def steps_per_epoch(num_pairs: int, batch_size: int) -> int:
    """Whole global batches in one pass over the data; the last partial one is dropped.

    Raises ValueError when the set is smaller than one batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} pairs; expected at least 1")
    if num_pairs < batch_size:
        raise ValueError(
            f"the training set has {num_pairs} usable pairs, fewer than one global batch of "
            f"{batch_size}; lower policy.train_global_batch_size or give more data"
        )
    return num_pairs // batch_size


def global_batch_rows(
    num_pairs: int, batch_size: int, *, seed: int, step: int, shuffle: bool
) -> list[int]:
    """Indices of the pairs of global batch `step` (from 0), alike for any number of ranks.

    Each epoch has its own permutation, a function of `seed` and the epoch alone.
    """
    if step < 0:
        raise ValueError(f"step={step}; expected 0 or more")
    epoch, index = divmod(step, steps_per_epoch(num_pairs, batch_size))
    begin = index * batch_size
    if not shuffle:
        return list(range(begin, begin + batch_size))
    return _permutation(num_pairs, seed, epoch)[begin : begin + batch_size].tolist()


def validation_batch_rows(
    num_pairs: int, batch_size: int, *, max_batches: int = 0
) -> Iterator[list[int]]:
    """Indices of the validation batches, in order, the last one possibly partial.

    `max_batches` <= 0 means the whole set.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} pairs; expected at least 1")
    stop = num_pairs if max_batches <= 0 else min(num_pairs, max_batches * batch_size)
    for begin in range(0, stop, batch_size):
        yield list(range(begin, min(begin + batch_size, stop)))


def packed_lengths(lengths: np.ndarray, rows: Sequence[int]) -> list[int]:
    """Tokens that each pair of `rows` takes in a packed row; `lengths` (n, 3) holds P, C, R."""
    selected = lengths[np.asarray(rows, dtype=np.int64)].astype(np.int64)
    return (2 * selected[:, 0] + selected[:, 1] + selected[:, 2]).tolist()


def build_packed_batch(
    pairs: Sequence[TokenizedPair],
    *,
    reference_logps: Sequence[np.ndarray | Tensor] | None = None,
    row_length: int | None = None,
    divisible_by: int = 1,
) -> PackedBatch:
    """Lay `pairs` out as prompt|chosen, prompt|rejected of pair 0, then of pair 1, ...

    `reference_logps`: per pair (C + R,), chosen then rejected. The row is padded up to
    `row_length` tokens, or (None) to the next multiple of `divisible_by`, at least one token.
    No pairs give a row of padding only. Raises ValueError for a side that cannot be trained on,
    a row that does not fit and reference log-probs of the wrong length.
    """
    sides = [(p, response) for p in pairs for response in (p.chosen, p.rejected)]
    for pair in pairs:
        _check_pair(pair)
    responses = _ints([len(response) for _, response in sides])
    prompts = _ints([len(pair.prompt) for pair, _ in sides])
    segments = prompts + responses
    num_tokens = int(segments.sum())
    padding = _row_length(num_tokens, row_length, divisible_by) - num_tokens

    tokens = _ints(
        [t for pair, response in sides for t in (*pair.prompt, *response)] + padding * [0]
    )
    if padding:
        segments = np.append(segments, padding)
    ends = np.cumsum(segments)
    position_ids = np.arange(len(tokens)) - np.repeat(ends - segments, segments)
    cu_seqlens = torch.from_numpy(np.append(0, ends).astype(np.int32))

    # The first response token sits at `starts`; the position before it predicts it.
    starts = ends[: len(sides)] - responses
    offsets = np.arange(int(responses.sum())) - np.repeat(
        np.cumsum(responses) - responses, responses
    )
    label_index = np.repeat(starts, responses) + offsets
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens.clone(),
        kv_index=None,
        max_seqlen_q=int(segments.max()),
        max_seqlen_kv=int(segments.max()),
        response_index=torch.from_numpy(label_index - 1),
        labels=torch.from_numpy(tokens[label_index]),
        sequence_id=torch.from_numpy(np.repeat(np.arange(len(sides)), responses)),
        reference_logps=_join_reference(pairs, reference_logps),
        response_lengths=torch.from_numpy(responses),
        pair_weights=torch.tensor([pair.weight for pair in pairs], dtype=torch.float32),
        rows=tuple(pair.row for pair in pairs),
        num_pairs=sum(pair.weight > 0 for pair in pairs),
        num_tokens=num_tokens,
    )


def response_rows(
    response_index: Tensor, row_length: int, *, part: int, num_parts: int
) -> ResponseRows:
    """The ResponseRows of `part` of a row cut into `num_parts`, as sequence parallelism cuts it.

    Call it with `response_index` on the host. Positions may repeat and come in any order.
    """
    assert row_length % num_parts == 0, (row_length, num_parts)
    part_length = row_length // num_parts
    owner = response_index // part_length
    order = None
    if bool((owner.diff() < 0).any()):
        order = owner.argsort(stable=True)
    return ResponseRows(
        index=response_index[owner == part] - part * part_length,
        splits=tuple(torch.bincount(owner, minlength=num_parts).tolist()),
        order=order,
        inverse=None if order is None else order.argsort(),
    )


def _check_pair(pair: TokenizedPair) -> None:
    for side in ("prompt", "chosen", "rejected"):
        if len(getattr(pair, side)) == 0:
            raise ValueError(
                f"row {pair.row}: the {side} side has no tokens; expected at least one token in "
                "prompt, chosen and rejected"
            )
    if not 0.0 <= pair.weight < float("inf"):
        raise ValueError(f"row {pair.row}: weight={pair.weight}; expected a finite number >= 0")


def _row_length(num_tokens: int, row_length: int | None, divisible_by: int) -> int:
    if row_length is None:
        return max(-(-num_tokens // divisible_by), 1) * divisible_by
    if row_length < max(num_tokens, 1) or row_length % divisible_by:
        raise ValueError(
            f"row_length={row_length}; expected a multiple of {divisible_by} that holds the "
            f"micro-batch's {num_tokens} tokens"
        )
    return row_length


def _join_reference(
    pairs: Sequence[TokenizedPair], reference_logps: Sequence[np.ndarray | Tensor] | None
) -> Tensor | None:
    if reference_logps is None:
        return None
    if len(reference_logps) != len(pairs):
        raise ValueError(f"{len(reference_logps)} reference log-prob rows for {len(pairs)} pairs")
    parts = [torch.as_tensor(part, dtype=torch.float32) for part in reference_logps]
    for pair, part in zip(pairs, parts, strict=True):
        expected = (len(pair.chosen) + len(pair.rejected),)
        if tuple(part.shape) != expected:
            raise ValueError(
                f"row {pair.row}: reference log-probs of shape {tuple(part.shape)}; expected "
                f"{expected}, the chosen and then the rejected response tokens"
            )
    return torch.cat([torch.empty(0), *parts])


def _ints(values: list[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int64)


def _tensors_to(record: Any, device: torch.device) -> Any:
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}
    return replace(record, **{k: _move(v, device) for k, v in tensors.items()})


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@functools.lru_cache(maxsize=2)
def _permutation(num_pairs: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState, because numpy promises that its stream never changes: a resumed run sees the
    # same order under another numpy.
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed}; expected an integer in [0, 2**64)")
    words = [seed & 0xFFFFFFFF, seed >> 32, epoch]
    return np.random.RandomState(words).permutation(num_pairs)
