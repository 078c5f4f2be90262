"""Reference log-probs on disk, for every run that shares weights, arithmetic and pairs.

    root/<digest>-<numerics>/reference.json     whose log-probs these are
    root/<digest>-<numerics>/<...>.parquet      shards (shards.py), only ever added

There are no locks: a shard appears whole under a name of its own, and readers check all of it.
What is damaged or missing is computed again. Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from reinforcer_tp.reference.keys import ReferenceKey, flat_keys, pair_ids
from reinforcer_tp.reference.shards import (
    FORMAT,
    REMEDY,
    DamagedShard,
    Shard,
    StoreError,
    check_writable,
    disk_errors,
    encode_shard,
    joined,
    read_shard,
    shard_paths,
    write_shard,
)
from reinforcer_tp.strict_json import parse_json
from reinforcer_tp.untrusted import CONFIG_BYTES
from reinforcer_tp.whole_files import write_whole

if TYPE_CHECKING:
    from reinforcer_tp.data.tokenized import TokenizedPair, TokenizedSet

__all__ = ["Description", "ReferenceKey", "ReferenceStore", "ShardWriter", "StoreError"]

SHARD_PAIRS = 4096  # pairs of a shard at most
SHARD_SECONDS = 60.0  # work that a crash may lose
DESCRIPTION = "reference.json"
FOLDER_NAME = re.compile(r"[0-9a-f]{32}-[a-z0-9_]+-v\d+")
_THREADS = min(8, os.cpu_count() or 1)  # that decode shards
_TOKEN_BYTES = 8  # of a response token: an id and a log-prob, uncompressed


@dataclass(frozen=True, kw_only=True)
class Description:
    """What reference.json says."""

    key: ReferenceKey
    model: str  # folder or hub id that the weights were first read from


class ReferenceStore:
    """The log-probs of one reference, in `root`/`key.name`/."""

    def __init__(self, root: Path, key: ReferenceKey, *, model: str) -> None:
        """Creates the folder and its reference.json where they are not there yet.

        `model` is for people and `verify`: a folder, of which the absolute path is kept, or a hub
        id.

        Raises:
            ValueError: reference.json there is of another format or reference.
            StoreError: the folder cannot be written.
        """
        self.key = key
        self.folder = Path(root) / key.name
        path = self.folder / DESCRIPTION
        with disk_errors(f"creating {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_whole(path, _description_text(key, model).encode())
        there = read_description(self.folder).key
        if there != key:
            raise ValueError(
                f"{path} is of reference {there.digest} in {there.numerics}, expected "
                f"{key.digest} in {key.numerics}; choose another reference.store_dir"
            )

    def read(
        self, pairs: TokenizedSet, rows: Sequence[int]
    ) -> tuple[dict[int, np.ndarray], list[str]]:
        """The log-probs of those of `pairs[rows]` that are stored, and a line on each bad shard.

        Index -> (C + R,) float32, chosen then rejected. The oldest shard with a pair counts, so
        that a run that goes on reads what it read before. Raises StoreError.
        """
        indices = sorted(set(rows))
        missing: dict[bytes, list[int]] = {}
        for key, index in zip(flat_keys(pairs.tokens, pairs.lengths(), indices), indices):
            missing.setdefault(key, []).append(index)
        found: dict[int, np.ndarray] = {}
        damaged: list[str] = []
        for path, shard in read_folder(self.folder, self.key) if missing else ():
            if isinstance(shard, DamagedShard):
                damaged.append(f"{path}: {shard}")
                continue
            ends = shard.num_responses.cumsum().tolist()
            begin = 0
            for key, end in zip(shard.keys, ends, strict=True):
                for index in missing.pop(key, ()):
                    found[index] = shard.logps[begin:end].copy()  # not the whole shard's memory
                begin = end
            if not missing:
                break
        return found, damaged

    def writer(self) -> ShardWriter:
        return ShardWriter(self.folder, self.key)

    def check_space(self, num_tokens: int) -> None:
        """Raises StoreError when nothing can be written or so many response tokens have no room."""
        needed = num_tokens * _TOKEN_BYTES
        with disk_errors(f"writing to {self.folder}"):
            check_writable(self.folder)
            free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise StoreError(
                f"{self.folder} has {free / 2**20:,.2f} MiB free, the log-probs of {num_tokens:,} "
                f"response tokens take about {needed / 2**20:,.2f} MiB; {REMEDY}"
            )


class ShardWriter:
    """Collects pairs and adds them to a store, a shard at a time. A context manager.

    Left without an exception it writes what it has; with one, what is not yet written is dropped.
    """

    def __init__(self, folder: Path, key: ReferenceKey) -> None:
        self._folder, self._key = folder, key
        self._pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._begin_s = 0.0  # when the oldest pair came

    def add(self, pair: TokenizedPair, logps: np.ndarray) -> None:
        """Takes the log-probs (C + R,) of one pair, chosen then rejected.

        Raises StoreError when the disk fails, and AssertionError where one is not finite.
        """
        logps = np.array(logps, np.float32)
        tokens, lengths = pair_ids(pair)
        assert logps.shape == (lengths[1:].sum(),), (logps.shape, lengths)
        assert np.isfinite(logps).all(), pair.row
        if not self._pairs:
            self._begin_s = time.monotonic()
        self._pairs.append((tokens, lengths, logps))
        if len(self._pairs) >= SHARD_PAIRS or time.monotonic() - self._begin_s >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what has been added as one shard, if anything. Raises StoreError."""
        pairs, self._pairs = self._pairs, []
        if pairs:
            write_shard(self._folder, encode_shard(joined(pairs), self._key))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.flush()
        self._pairs = []


def _description_text(key: ReferenceKey, model: str) -> str:
    folder = Path(model).expanduser()
    content = {
        "format": FORMAT,
        "digest": key.digest,
        "numerics": key.numerics,
        "model": os.path.abspath(folder) if folder.is_dir() else model,
    }
    return json.dumps(content, indent=2) + "\n"


def read_description(folder: Path) -> Description:
    """The reference.json of a reference's folder.

    Raises:
        ValueError: it is damaged or of another format.
        StoreError: it cannot be read.
    """
    path = folder / DESCRIPTION
    if not path.exists():
        raise ValueError(f"{path} is missing; a run that uses this reference writes it again")
    with disk_errors(f"reading {path}"), open(path, "rb") as file:
        content = file.read(CONFIG_BYTES + 1)
    try:
        read = parse_json(content)
    except ValueError as error:
        reason = str(error)[:200]
        raise ValueError(f"{path} is not JSON ({reason}); delete it, the shards stay") from error
    names = ("digest", "numerics", "model")
    if not isinstance(read, dict) or read.get("format") != FORMAT:
        found = read.get("format") if isinstance(read, dict) else type(read).__name__
        raise ValueError(
            f"{path} has format {found!r}, expected {FORMAT}; choose another reference.store_dir"
        )
    if not all(isinstance(read.get(name), str) for name in names):
        raise ValueError(f"{path} lacks one of {', '.join(names)}; delete it, the shards stay")
    key = ReferenceKey(digest=read["digest"], numerics=read["numerics"])
    return Description(key=key, model=read["model"])


def reference_folders(root: Path) -> list[Path]:
    """The folders of a store that hold a reference, by name. Raises StoreError."""
    with disk_errors(f"listing {root}"):
        names = sorted(os.listdir(root))
    folders = [root / name for name in names if FOLDER_NAME.fullmatch(name)]
    return [f for f in folders if (f / DESCRIPTION).is_file() or (f.is_dir() and shard_paths(f))]


def read_folder(folder: Path, key: ReferenceKey) -> Iterator[tuple[Path, Shard | DamagedShard]]:
    """Every shard of a reference, oldest first; a few are decoded at a time, on several threads.

    Raises StoreError where the folder cannot be listed.
    """

    def attempt(path: Path) -> Shard | DamagedShard | None:
        try:
            return read_shard(path, key)
        except DamagedShard as damaged:
            return damaged

    paths = shard_paths(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        for begin in range(0, len(paths), _THREADS):
            part = paths[begin : begin + _THREADS]
            for path, shard in zip(part, pool.map(attempt, part), strict=True):
                if shard is not None:  # else it has vanished
                    yield path, shard
