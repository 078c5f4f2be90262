"""What may be removed from a store: only files with a name that a store gives, never another."""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from reinforcer_tp.reference.shards import (
    SHARD_NAME,
    DamagedShard,
    UnreadableShard,
    disk_errors,
)
from reinforcer_tp.reference.store import DESCRIPTION, read_description, read_folder
from reinforcer_tp.whole_files import BUILDING_NAME

_DEAD_S = 3600.0  # a writer holds an unfinished file for seconds
_DAY_S = 86400.0


@dataclass(frozen=True, kw_only=True)
class Doomed:
    """A file to remove."""

    path: Path
    reason: str
    num_bytes: int


def whole_reference(folder: Path) -> list[Doomed]:
    """Every file of a reference, its reference.json last. Raises StoreError."""
    names = sorted(_names(folder), key=lambda name: (name == DESCRIPTION, name))
    ours = (n for n in names if n == DESCRIPTION or _is_shard(n) or _is_unfinished(n))
    return [_doomed(folder / name, "of the reference") for name in ours]


def waste(folder: Path, *, older_than_days: float | None) -> list[Doomed]:
    """Leftovers of dead writers, damaged shards, and shards not modified for so long, if given.

    Raises:
        ValueError: reference.json is damaged, so that no shard can be judged.
        StoreError: the folder cannot be listed.
    """
    now = time.time()
    names = sorted(_names(folder))
    doomed = [
        _doomed(folder / name, "left by a dead writer")
        for name in names
        if _is_unfinished(name) and now - _modified(folder / name) > _DEAD_S
    ]
    damaged = {
        path.name: f"damaged: {shard}"
        for path, shard in read_folder(folder, read_description(folder).key)
        if isinstance(shard, DamagedShard) and not isinstance(shard, UnreadableShard)
    }
    doomed += [_doomed(folder / name, reason) for name, reason in damaged.items()]
    if older_than_days is not None:
        limit = older_than_days * _DAY_S
        doomed += [
            _doomed(folder / name, "old")
            for name in names
            if _is_shard(name) and name not in damaged and now - _modified(folder / name) > limit
        ]
    return doomed


def remove(doomed: Sequence[Doomed]) -> None:
    """Removes the files, and their folder where that leaves it empty. Raises StoreError."""
    for file in doomed:
        with disk_errors(f"removing {file.path}"):
            file.path.unlink(missing_ok=True)
    for folder in {file.path.parent for file in doomed}:
        with suppress(OSError):  # what is not ours stays
            folder.rmdir()


def _names(folder: Path) -> list[str]:
    with disk_errors(f"listing {folder}"):
        return os.listdir(folder)


def _is_shard(name: str) -> bool:
    return SHARD_NAME.fullmatch(name) is not None


def _is_unfinished(name: str) -> bool:
    return BUILDING_NAME.fullmatch(name) is not None


def _doomed(path: Path, reason: str) -> Doomed:
    num_bytes = 0
    with suppress(FileNotFoundError):  # it has just vanished
        num_bytes = path.stat().st_size
    return Doomed(path=path, reason=reason, num_bytes=num_bytes)


def _modified(path: Path) -> float:
    """Unix time; a file that has just vanished is new."""
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return float("inf")
