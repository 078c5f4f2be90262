"""Full disks, killed writers and several of them at once cost one shard at most, never a number."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from reinforcer_tp import whole_files
from reinforcer_tp.reference import shards, store
from reinforcer_tp.reference.store import StoreError
from tests.unit.reference_pairs import (
    KEY,
    POINTS,
    SHARD_PAIRS,
    check,
    files,
    fill,
    opened,
    pair,
    shard_files,
    tokenized,
    true_logps,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_disk_that_fails_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, call, number):
    fill(tmp_path, range(2))
    before = files(tmp_path)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        if call == "open":
            patched.setattr(whole_files, "open", fail, raising=False)
        else:
            patched.setattr(shards.os, call, fail)
        with pytest.raises(StoreError) as error:
            fill(tmp_path, range(2, 4))
    text = str(error.value)
    expected = (os.strerror(number), KEY.name, "reference.store_dir=", "reference.mode=resident")
    assert all(part in text for part in expected) and "\n" not in text
    assert files(tmp_path) == before
    fill(tmp_path, range(2, 4))
    assert check(tmp_path, range(4), range(4)) == []


def test_bytes_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    """What a power failure needs, which no killed process can show."""
    own, calls = opened(tmp_path), []
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        calls.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def renamed(*paths):
        calls.append("rename")
        replace(*paths)

    monkeypatch.setattr(shards.os, "fsync", synced)
    monkeypatch.setattr(shards.os, "replace", renamed)
    with own.writer() as writer:
        writer.add(pair(0), true_logps(pair(0)))
    assert calls == ["file", "rename", "folder"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"creating .*file.*Not a directory") as error:
        opened(tmp_path / "file")
    assert "\n" not in str(error.value)


def test_a_pruned_folder_is_one_line(tmp_path):
    own = opened(tmp_path)
    shutil.rmtree(own.folder)
    with pytest.raises(StoreError, match="listing"):
        own.read(tokenized([0]), [0])
    writer = own.writer()
    writer.add(pair(0), true_logps(pair(0)))
    with pytest.raises(StoreError, match="No such file"):
        writer.flush()


def test_space_is_asked_for_beforehand(tmp_path, monkeypatch):
    own = opened(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=80 * 2**20)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda folder: usage)
    own.check_space(10 * 2**20)  # a token takes an id and a log-prob, 8 bytes
    with pytest.raises(StoreError, match=r"80.00 MiB free.* take about 88.00 MiB") as error:
        own.check_space(11 * 2**20)
    assert str(own.folder) in str(error.value) and "reference.store_dir=" in str(error.value)


def start(folder: Path, what: str, first: int, last: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.unit.reference_pairs", str(folder), what]
    return subprocess.Popen(
        [*command, str(first), str(last)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_writer_loses_one_shard_at_most(tmp_path, point):
    first = start(tmp_path, point, 0, 3 * SHARD_PAIRS)
    assert first.wait(timeout=60) == -signal.SIGKILL
    num_shards = 2 if point == "after the rename" else 1
    assert len(shard_files(tmp_path)) == num_shards
    num_leftovers = point in ("half of the file", "before the sync", "before the rename")
    assert len(files(tmp_path)) == num_shards + num_leftovers + 1
    survivors = range(num_shards * SHARD_PAIRS)
    assert check(tmp_path, range(3 * SHARD_PAIRS), survivors) == []
    fill(tmp_path, range(len(survivors), 3 * SHARD_PAIRS))
    assert check(tmp_path, range(3 * SHARD_PAIRS), range(3 * SHARD_PAIRS)) == []


@pytest.mark.parametrize("point", ["half of the file", "before the rename", "after the rename"])
def test_a_store_whose_founder_was_killed_is_usable(tmp_path, point):
    first = start(tmp_path, f"description: {point}", 0, 1)
    assert first.wait(timeout=60) == -signal.SIGKILL
    assert [p.name for p in files(tmp_path) if p.name == "reference.json"] == (
        ["reference.json"] if point == "after the rename" else []
    )
    fill(tmp_path, range(2))
    assert check(tmp_path, range(2), range(2)) == []


def test_two_writers_and_a_reader_at_once(tmp_path):
    """Both store rows 40 to 79; what is found only grows, and is right at any moment."""
    whole = range(0, 120)
    pairs = tokenized(whole)
    writers = [start(tmp_path, "", 0, 80), start(tmp_path, "", 40, 120)]
    count = 0
    deadline = time.monotonic() + 60
    while any(writer.poll() is None for writer in writers):
        assert time.monotonic() < deadline
        found, damaged = opened(tmp_path).read(pairs, whole)
        assert damaged == [] and len(found) >= count
        count = len(found)
        for index, logps in found.items():
            np.testing.assert_array_equal(logps, true_logps(pair(index)))
    assert [writer.returncode for writer in writers] == [0, 0]
    assert check(tmp_path, whole, whole) == []
    assert len(shard_files(tmp_path)) == 2 * 80 // SHARD_PAIRS
    assert len(files(tmp_path)) == 2 * 80 // SHARD_PAIRS + 1


def test_a_full_disk_in_the_middle_of_a_file(tmp_path):
    """A real failure of write(2), by the limit on the size of a file."""
    opened(tmp_path)
    child = start(tmp_path, "full", 0, SHARD_PAIRS)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0 and output.count("\n") == 1
    assert "File too large" in output and KEY.name in output
    assert [path.name for path in files(tmp_path)] == ["reference.json"]
