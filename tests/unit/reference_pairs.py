"""Pairs whose log-probs anyone can recompute, a process that dies while it stores them, and what a
command printed.

Imports no torch, so that the tests that start many processes stay short.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reinforcer_tp import whole_files
from reinforcer_tp.reference import store
from reinforcer_tp.reference.keys import pair_key
from reinforcer_tp.reference.store import ReferenceKey, ReferenceStore, StoreError

KEY = ReferenceKey("5a" * 32, "float32-v1")
SHARD_PAIRS = 4


class Pair(NamedTuple):
    """As much of a TokenizedPair as the store looks at."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    row: int = 0


def pair(row: int) -> Pair:
    """The pair of `row`; 1 to 5 tokens on a side."""
    generator = np.random.default_rng(row)
    sides = (generator.integers(0, 50_000, size).tolist() for size in generator.integers(1, 6, 3))
    return Pair(*sides, row)


def true_logps(of: Pair) -> np.ndarray:
    """(C + R,) float32: a function of the ids alone."""
    generator = np.random.default_rng(np.frombuffer(pair_key(of), np.uint64))
    size = len(of.chosen) + len(of.rejected)
    return -generator.exponential(2.0, size).astype(np.float32)


def fill(folder: Path, rows: Iterable[int]) -> None:
    with opened(folder).writer() as writer:
        for row in rows:
            writer.add(pair(row), true_logps(pair(row)))


def tokenized(rows: Iterable[int]):
    """The pairs of `rows` as a TokenizedSet."""
    from reinforcer_tp.data.tokenized import TokenizedPair, TokenizedSet

    return TokenizedSet.from_pairs(TokenizedPair(**pair(row)._asdict()) for row in rows)


def opened(folder: Path, key: ReferenceKey = KEY) -> ReferenceStore:
    return ReferenceStore(folder, key, model="/models/m")


def check(folder: Path, rows: Iterable[int], expected_rows: Iterable[int]) -> list[str]:
    """Exactly `expected_rows` of `rows` are there, bit for bit. Returns the damaged shards."""
    rows = list(rows)
    found, damaged = opened(folder).read(tokenized(rows), range(len(rows)))
    assert {rows[index] for index in found} == set(expected_rows)
    for index, logps in found.items():
        assert logps.dtype == np.float32
        np.testing.assert_array_equal(logps, true_logps(pair(rows[index])))
    return damaged


def files(folder: Path) -> list[Path]:
    return sorted((folder / KEY.name).iterdir())


def shard_files(folder: Path) -> list[Path]:
    return [path for path in files(folder) if path.suffix == ".parquet"]


def lines_of(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def one_error(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    return captured.err


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class HalfWritten:
    """An open file that dies with half of the first write on the disk."""

    def __init__(self, path: Path, mode: str) -> None:
        assert mode == "xb"
        self.handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def __enter__(self) -> "HalfWritten":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, content: bytes) -> None:
        os.write(self.handle, content[: len(content) // 2])
        die()


def after(function: Callable) -> Callable:
    def wrapped(*arguments):
        function(*arguments)
        die()

    return wrapped


# Where a writer dies -> (module or builtin that is replaced, its name, by what).
POINTS = {
    "before the file": (whole_files.secrets, "token_hex", die),
    "half of the file": (whole_files, "open", HalfWritten),
    "before the sync": (whole_files.os, "fsync", die),
    "before the rename": (whole_files.os, "replace", die),
    "after the rename": (whole_files.os, "replace", after(os.replace)),
}


def main(folder: str, what: str, first: str, last: str) -> None:
    """Stores pairs `first` to `last`; dies at the point `what` of the second shard, if it is one.

    `what` "description: POINT" dies while reference.json is written, "full" has no room for more
    than 300 bytes in a file.
    """
    store.SHARD_PAIRS = SHARD_PAIRS
    rows = range(int(first), int(last))
    if what == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
    elif what.startswith("description: "):
        setattr(*POINTS[what.removeprefix("description: ")])
    elif what in POINTS:
        fill(Path(folder), rows[:SHARD_PAIRS])
        setattr(*POINTS[what])
        rows = rows[SHARD_PAIRS:]
    try:
        fill(Path(folder), rows)
    except StoreError as error:
        print(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
