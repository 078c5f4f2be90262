"""The tensors of one packed micro-batch, with the prompt of a pair laid out once.

Legend: B pairs, S = 2B sequences (2i is the chosen and 2i + 1 the rejected side of pair i),
T tokens of the packed row, N response tokens, K keys, G attention segments.

A pair that shares its first `s` tokens takes the row `prompt chosen`, then `(prompt rejected)[s:]`:

    tokens         p0 p1 p2 c0 c1 | r0 r1        s = 3, the prompt
    position_ids    0  1  2  3  4 |  3  4
    keys it sees   p0 ... itself  | p0 p1 p2, r0 ... itself
    predicts             c0 c1    |     r1       and p2 predicts r0 as well

Each side of the bar is a segment of causal attention; `kv_index` brings the second one its first
keys. s = 0 lays out both sequences in full.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from reinforcer_tp.data.tokenized import TokenizedPair

# Padding is cut into segments of this many tokens, since attention pays for the square.
_PADDING_SEGMENT = 64


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One packed micro-batch; every index is made on the host, so a step never synchronises."""

    tokens: Tensor  # (T,) int64, padding is token 0
    position_ids: Tensor  # (T,) int64, of each token in its own sequence
    cu_seqlens_q: Tensor  # (G + 1,) int32, borders of segments; padding has its own at the end
    cu_seqlens_kv: Tensor  # (G + 1,) int32, borders of their keys
    kv_index: Tensor | None  # (K,) int64, positions of the keys; None = the tokens in their order
    max_seqlen_q: int  # tokens of the longest segment
    max_seqlen_kv: int
    response_index: Tensor  # (N,) int64, position that predicts each response token; may repeat
    labels: Tensor  # (N,) int64, that response token
    sequence_id: Tensor  # (N,) int64 in [0, 2B), never decreasing
    reference_logps: Tensor | None  # (N,) float64: sums that come with the rows stay exact
    response_lengths: Tensor  # (2B,) int64, response tokens of each sequence
    pair_weights: Tensor  # (B,) float32
    pair_margins: Tensor  # (B,) float32, by how much chosen should beat rejected
    rows: tuple[int, ...]  # (B,) rows in the source
    num_pairs: int  # pairs of weight > 0: what the loss is normalised by
    num_tokens: int  # real tokens, padding not counted

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on `device`; copies to a GPU go through pinned memory and do not wait."""
        return tensors_to(self, torch.device(device))


@dataclass(frozen=True, kw_only=True)
class ResponseRows:
    """The response tokens whose positions lie in one of the even parts of a packed row."""

    index: Tensor  # (n,) int64, positions within the part
    splits: tuple[int, ...]  # n of each part, N in all
    order: Tensor | None  # (N,) int64, the tokens part by part; None = they are in that order
    inverse: Tensor | None  # (N,) int64, undoes `order`

    def to(self, device: torch.device | str) -> ResponseRows:
        return tensors_to(self, torch.device(device))


def packed_lengths(
    lengths: np.ndarray,  # (n, 3): tokens of prompt, chosen, rejected
    shared: np.ndarray,  # (n,)
) -> np.ndarray:  # (n,) int64
    """Tokens that each pair takes in a packed row."""
    prompt, chosen, rejected = lengths.astype(np.int64).T
    return 2 * prompt + chosen + rejected - shared


def build_packed_batch(
    pairs: Sequence[TokenizedPair],
    *,
    shared: Sequence[int] | None = None,
    reference_logps: Sequence[np.ndarray | Tensor] | None = None,
    row_length: int | None = None,
    divisible_by: int = 1,
) -> PackedBatch:
    """Lays out `pairs` one after the other, as the module's docstring shows.

    `shared`: per pair the first tokens that both sequences have in common and that are laid out
    once, less than all of the rejected one; None = 0. `reference_logps`: per pair (C + R,), chosen
    then rejected. The row is padded up to `row_length` tokens, or (None) to the next multiple of
    `divisible_by`, at least one token. No pairs give a row of padding only. Raises ValueError for a
    side that cannot be trained on, a row that does not fit and reference log-probs of the wrong
    length.
    """
    for pair in pairs:
        _check_pair(pair)
    shared = [0] * len(pairs) if shared is None else shared
    layout = _Layout.of(pairs, shared)
    num_tokens = int(layout.queries.sum())
    padding = _row_length(num_tokens, row_length, divisible_by) - num_tokens
    paddings = _cut(padding, _PADDING_SEGMENT)
    own_tokens = (
        pair.prompt + pair.chosen + (pair.prompt + pair.rejected)[count:]
        for pair, count in zip(pairs, shared, strict=True)
    )
    tokens = _ints([token for ids in own_tokens for token in ids] + padding * [0])

    queries, keys = layout.queries, layout.shared + layout.queries
    position_ids = np.concatenate((_ragged(queries, layout.shared), _ragged(paddings)))
    kv_index = None
    if any(shared):
        places = layout.place(_owners(keys), _ragged(keys))
        kv_index = torch.from_numpy(np.append(places, num_tokens + np.arange(padding)))
    queries, keys = np.append(queries, paddings), np.append(keys, paddings)
    sequence_id, offset = _owners(layout.responses), _ragged(layout.responses, layout.prompts)
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens_q=_borders(queries),
        cu_seqlens_kv=_borders(keys),
        kv_index=kv_index,
        max_seqlen_q=int(queries.max()),
        max_seqlen_kv=int(keys.max()),
        response_index=torch.from_numpy(layout.place(sequence_id, offset - 1)),
        labels=torch.from_numpy(tokens[layout.place(sequence_id, offset)]),
        sequence_id=torch.from_numpy(sequence_id),
        reference_logps=_join_reference(pairs, reference_logps),
        response_lengths=torch.from_numpy(layout.responses),
        pair_weights=torch.tensor([pair.weight for pair in pairs], dtype=torch.float32),
        pair_margins=torch.tensor([pair.margin for pair in pairs], dtype=torch.float32),
        rows=tuple(pair.row for pair in pairs),
        num_pairs=sum(pair.weight > 0 for pair in pairs),
        num_tokens=num_tokens,
    )


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where each sequence's tokens stand in the row; arrays of (S,) int64."""

    prompts: np.ndarray  # tokens of the prompt
    responses: np.ndarray  # tokens of the response
    shared: np.ndarray  # first tokens that stand in the pair's chosen sequence
    queries: np.ndarray  # tokens laid out for this sequence alone
    starts: np.ndarray  # where those begin
    pair_starts: np.ndarray  # where the pair begins

    @classmethod
    def of(cls, pairs: Sequence[TokenizedPair], shared: Sequence[int]) -> _Layout:
        for pair, count in zip(pairs, shared, strict=True):
            common = max(count - len(pair.prompt), 0)
            assert count in (0, len(pair.prompt)) or common, (pair.row, count)
            assert common < len(pair.rejected), (pair.row, count)
            assert pair.chosen[:common] == pair.rejected[:common], (pair.row, count)
        prompts = np.repeat(_ints([len(pair.prompt) for pair in pairs]), 2)
        responses = _ints([len(side) for p in pairs for side in (p.chosen, p.rejected)])
        shared_by_sequence = _ints([n for count in shared for n in (0, count)])
        queries = prompts + responses - shared_by_sequence
        starts = np.cumsum(queries) - queries
        return cls(
            prompts=prompts,
            responses=responses,
            shared=shared_by_sequence,
            queries=queries,
            starts=starts,
            pair_starts=np.repeat(starts[::2], 2),
        )

    def place(self, sequence: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """Position in the row of token `offset` of each given sequence."""
        shared = self.shared[sequence]
        begin = np.where(
            offset < shared, self.pair_starts[sequence], self.starts[sequence] - shared
        )
        return begin + offset


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


def tensors_to(record: Any, device: torch.device) -> Any:
    """A dataclass with its tensors on `device`; copies to a GPU are pinned and do not wait."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}
    return replace(record, **{k: move(v, device) for k, v in tensors.items()})


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _check_pair(pair: TokenizedPair) -> None:
    for side in ("prompt", "chosen", "rejected"):
        if len(getattr(pair, side)) == 0:
            raise ValueError(
                f"row {pair.row}: the {side} side has no tokens; expected at least one token in "
                "prompt, chosen and rejected"
            )
    if not 0.0 <= pair.weight < float("inf"):
        raise ValueError(f"row {pair.row}: weight={pair.weight}; expected a finite number >= 0")
    if not math.isfinite(pair.margin):
        raise ValueError(f"row {pair.row}: margin={pair.margin}; expected a finite number")


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
    parts = [torch.as_tensor(part, dtype=torch.float64) for part in reference_logps]
    for pair, part in zip(pairs, parts, strict=True):
        expected = (len(pair.chosen) + len(pair.rejected),)
        if tuple(part.shape) != expected:
            raise ValueError(
                f"row {pair.row}: reference log-probs of shape {tuple(part.shape)}; expected "
                f"{expected}, the chosen and then the rejected response tokens"
            )
    return torch.cat([torch.empty(0, dtype=torch.float64), *parts])


def _ints(values: list[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int64)


def _borders(lengths: np.ndarray) -> Tensor:
    return torch.from_numpy(np.append(0, np.cumsum(lengths)).astype(np.int32))


def _cut(length: int, part: int) -> np.ndarray:
    """5 by 2 -> [2, 2, 1]."""
    return np.diff(np.append(np.arange(0, length, part), length))


def _owners(lengths: np.ndarray) -> np.ndarray:
    """[2, 1] -> [0, 0, 1]."""
    return np.repeat(np.arange(len(lengths)), lengths)


def _ragged(lengths: np.ndarray, begins: np.ndarray | int = 0) -> np.ndarray:
    """[2, 1] -> [0, 1, 0], counted from `begins`."""
    return np.arange(int(lengths.sum())) + np.repeat(begins + lengths - np.cumsum(lengths), lengths)
