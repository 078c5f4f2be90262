"""What reference log-probs depend on, as hashes: the weights, the arithmetic and a pair's ids.

Nothing here depends on how a run is laid out, on file names or on the order of rows, so that any
run finds what any other one has computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # this module is read by tools that must not wait for torch
    from reinforcer_tp.data.tokenized import TokenizedPair
    from reinforcer_tp.mcore.weights import RandomReader, SafetensorsReader

MATHS_VERSION = 1  # of the forward pass; raise it when log-probs change by more than rounding
_THREADS = 4  # that hash tensors; hashing needs no interpreter lock


@dataclass(frozen=True)
class ReferenceKey:
    """Whose log-probs: the weights' digest and the arithmetic."""

    digest: str  # 64 hex digits, of `reference_digest`
    numerics: str  # of `numerics`

    @property
    def name(self) -> str:
        """The name of the folder in a store."""
        return f"{self.digest[:32]}-{self.numerics}"


def numerics(precision: str, fp8: str | None = None) -> str:
    """The arithmetic of a forward pass, as `float32-v1` or `bfloat16_fp8_hybrid-v1`."""
    name = precision if fp8 in (None, "off") else f"{precision}_fp8_{fp8}"
    return f"{name}-v{MATHS_VERSION}"


def pair_key(pair: TokenizedPair) -> bytes:
    """SHA-256 over the three lengths and the ids of prompt, chosen and rejected, all as int32.

    The lengths say which tokens are responses: they are the mask.
    """
    tokens, lengths = pair_ids(pair)
    return flat_keys(tokens, lengths[None])[0]


def pair_ids(pair: TokenizedPair) -> tuple[np.ndarray, np.ndarray]:
    """Ids (prompt + chosen + rejected,) and lengths (3,), int32."""
    sides = (pair.prompt, pair.chosen, pair.rejected)
    tokens = np.array([token for side in sides for token in side], np.int32)
    return tokens, np.array([len(side) for side in sides], np.int32)


def flat_keys(
    tokens: np.ndarray,  # (sum of lengths,) int32: prompt, chosen, rejected of each pair in turn
    lengths: np.ndarray,  # (n, 3) int32
    rows: Sequence[int] | None = None,  # of `lengths`; None = all
) -> list[bytes]:
    """`pair_key` of many pairs at once, in the order of `rows`."""
    tokens, lengths = _little_endian(tokens), _little_endian(lengths)
    sizes = lengths.sum(axis=1, dtype=np.int64)
    ends = sizes.cumsum()
    picked = np.arange(len(lengths)) if rows is None else np.asarray(rows, np.int64)
    heads = lengths[picked].tobytes()
    keys = []
    spans = zip((ends - sizes)[picked].tolist(), ends[picked].tolist(), strict=True)
    for position, (begin, end) in enumerate(spans):
        state = hashlib.sha256(heads[12 * position : 12 * position + 12])
        state.update(tokens[begin:end])
        keys.append(state.digest())
    return keys


def _little_endian(array: np.ndarray) -> np.ndarray:
    assert array.dtype == np.int32, array.dtype
    return np.ascontiguousarray(array, dtype="<i4")


def tensor_digests(
    reader: SafetensorsReader | RandomReader, names: Sequence[str]
) -> dict[str, str]:
    """SHA-256 over dtype, shape and bytes of each Hugging Face tensor as it is stored.

    Some tensors are in memory at a time. Whoever shares the work gives each process some names.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda n: _tensor_digest(reader.read(n)), names)))


def _tensor_digest(tensor: Any) -> str:
    import torch

    state = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    state.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def reference_digest(digests: Mapping[str, str], maths: Mapping[str, Any]) -> str:
    """One digest of a model: of its tensors, by name, and of what else decides the forward pass.

    `digests` come from `tensor_digests` over all tensors; `maths` holds JSON values. How the
    tensors are spread over files, and their order, do not matter.
    """
    content = {"tensors": dict(digests), "maths": dict(maths)}
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
