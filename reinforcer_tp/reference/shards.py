"""One shard of a reference store: a parquet file named by the hash of its bytes.

    <unix time in ns, 20 digits>-<first 32 hex digits of SHA-256 of the bytes>.parquet

A row is one pair: `key` (its hash), `lengths` of prompt, chosen and rejected, their `tokens` and
the `logps` of chosen and rejected. The metadata names the reference, so that a shard copied from
another reference's folder is found out. Imports no torch.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reinforcer_tp.reference.keys import ReferenceKey, flat_keys
from reinforcer_tp.whole_files import building_name, write_whole

FORMAT = 1  # of shards and of reference.json
REMEDY = (
    "free space, give another folder (reference.store_dir=...), or do without a store "
    "(reference.mode=resident reference.store_dir=null)"
)
SHARD_NAME = re.compile(r"(\d{20})-([0-9a-f]{32})\.parquet")


def _list_of(kind: pa.DataType, size: int = -1) -> pa.DataType:
    return pa.list_(pa.field("element", kind, nullable=False), size)


SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(32), nullable=False),
        pa.field("lengths", _list_of(pa.int32(), 3), nullable=False),
        pa.field("tokens", _list_of(pa.int32()), nullable=False),
        pa.field("logps", _list_of(pa.float32()), nullable=False),
    ]
)
_SPLIT = ["tokens.list.element", "logps.list.element"]  # bytes by significance: smaller, faster


class StoreError(RuntimeError):
    """The store's disk or what should go there is at fault; one line."""


class DamagedShard(Exception):
    """Why the shard must not be used."""


class UnreadableShard(DamagedShard):
    """The file system does not give its bytes, which may well be right."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """n pairs in flat arrays."""

    keys: list[bytes]  # n
    lengths: np.ndarray  # (n, 3) int32
    tokens: np.ndarray  # (sum of lengths,) int32
    logps: np.ndarray  # (sum of response lengths,) float32

    @property
    def num_responses(self) -> np.ndarray:
        """(n,) int64: response tokens of each pair."""
        return self.lengths[:, 1:].sum(axis=1, dtype=np.int64)


def encode_shard(shard: Shard, key: ReferenceKey) -> bytes:
    """The content of a parquet file."""
    values = [
        pa.array(shard.keys, pa.binary(32)),
        pa.FixedSizeListArray.from_arrays(
            pa.array(shard.lengths.reshape(-1)), type=SCHEMA.field("lengths").type
        ),
        _lists(shard.tokens, shard.lengths.sum(axis=1), SCHEMA.field("tokens").type),
        _lists(shard.logps, shard.num_responses, SCHEMA.field("logps").type),
    ]
    table = pa.Table.from_arrays(values, schema=SCHEMA.with_metadata(_metadata(key)))
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="zstd", use_dictionary=False, use_byte_stream_split=_SPLIT
    )
    return sink.getvalue().to_pybytes()


def _lists(values: np.ndarray, lengths: np.ndarray, kind: pa.DataType) -> pa.Array:
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=kind)


def _metadata(key: ReferenceKey) -> dict[bytes, bytes]:
    return {
        b"reinforcer_tp.reference": f"{key.digest}-{key.numerics}".encode(),
        b"reinforcer_tp.format": str(FORMAT).encode(),
    }


def read_shard(path: Path, key: ReferenceKey) -> Shard | None:
    """A shard of this reference, checked down to its values; None where it has just vanished.

    Raises:
        DamagedShard: it cannot be read (UnreadableShard), is not as it was written, or is of
            another reference.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnreadableShard(f"cannot be read ({error.strerror})") from error
    if hashlib.sha256(content).hexdigest()[:32] != SHARD_NAME.fullmatch(path.name)[2]:
        raise DamagedShard("its bytes are not those that were written")
    try:
        table = pq.read_table(pa.BufferReader(content), use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DamagedShard(f"no parquet file ({reason})") from error
    return _decode(table, key)


def _decode(table: pa.Table, key: ReferenceKey) -> Shard:
    metadata = table.schema.metadata or {}
    expected = _metadata(key)
    if {name: metadata.get(name) for name in expected} != expected:
        raise DamagedShard("written for another reference, or in another format")
    if not table.schema.equals(SCHEMA) or table.num_rows == 0:
        raise DamagedShard("its columns are not those of a shard, or it is empty")
    keys, lengths, tokens, logps = (c.combine_chunks() for c in table.columns)
    shard = Shard(
        keys=keys.to_pylist(),
        lengths=lengths.flatten().to_numpy().reshape(-1, 3),
        tokens=tokens.flatten().to_numpy(),
        logps=logps.flatten().to_numpy(),
    )
    _check(shard, tokens.value_lengths().to_numpy(), logps.value_lengths().to_numpy())
    return shard


def _check(shard: Shard, num_tokens: np.ndarray, num_logps: np.ndarray) -> None:
    lengths = shard.lengths
    if (
        (lengths < 0).any()
        or (lengths.sum(axis=1, dtype=np.int64) != num_tokens).any()
        or (shard.num_responses != num_logps).any()
    ):
        raise DamagedShard("its lengths are not those of its lists")
    if flat_keys(shard.tokens, lengths) != shard.keys:
        raise DamagedShard("a key is not the hash of its ids")
    if not np.isfinite(shard.logps).all():
        raise DamagedShard("a log-prob is not finite")


def shard_paths(folder: Path) -> list[Path]:
    """The shards in a reference's folder, oldest first. Raises StoreError."""
    with disk_errors(f"listing {folder}"):
        names = os.listdir(folder)
    return [folder / name for name in sorted(names) if SHARD_NAME.fullmatch(name)]


def write_shard(folder: Path, content: bytes) -> Path:
    """Puts `content` into `folder` under a name that sorts after all shards there.

    Raises StoreError.
    """
    now = time.time_ns()
    earlier = shard_paths(folder)
    if earlier:  # the first value of a key counts, also where clocks disagree
        now = max(now, int(earlier[-1].name[:20]) + 1)
    path = folder / f"{now:020d}-{hashlib.sha256(content).hexdigest()[:32]}.parquet"
    with disk_errors(f"writing a shard of {len(content) / 2**20:.1f} MiB to {folder}"):
        write_whole(path, content)
    return path


def check_writable(folder: Path) -> None:
    """Raises OSError where no file can be made."""
    probe = building_name(folder)
    probe.touch(exist_ok=False)
    probe.unlink()


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """OSError -> StoreError, which says what was being done and how to go on without it."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{doing} failed: {error.strerror or error}; mend the permissions, {REMEDY}"
        ) from error


def joined(pairs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Shard:
    """A shard of pairs given as ids (P + C + R,), lengths (3,) and log-probs (C + R,)."""
    tokens, lengths, logps = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    lengths = lengths.reshape(-1, 3)
    return Shard(keys=flat_keys(tokens, lengths), lengths=lengths, tokens=tokens, logps=logps)
