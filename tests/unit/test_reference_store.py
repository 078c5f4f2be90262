"""The store gives back what was put in, or says that it cannot; never another number."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforcer_tp.data.tokenized import TokenizedPair, TokenizedSet
from reinforcer_tp.reference import shards, store
from reinforcer_tp.reference.keys import pair_key
from reinforcer_tp.reference.store import ReferenceKey, ReferenceStore, StoreError
from tests.unit.reference_pairs import KEY, POINTS, SHARD_PAIRS, fill, pair, true_logps

ROOT = Path(__file__).resolve().parents[2]
OTHER = ReferenceKey("5b" * 32, "float32-v1")


def tokenized(rows) -> TokenizedSet:
    return TokenizedSet.from_pairs(TokenizedPair(**pair(row)._asdict()) for row in rows)


def opened(folder: Path, key: ReferenceKey = KEY) -> ReferenceStore:
    return ReferenceStore(folder, key, model="/models/m")


def check(folder: Path, rows, expected_rows) -> list[str]:
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


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_what_was_put_in_comes_out(tmp_path_factory, data):
    """Any lengths, also none, and any finite float32."""
    folder = tmp_path_factory.mktemp("store")
    ids = st.lists(st.integers(0, 2**31 - 1), max_size=4)
    pairs = data.draw(
        st.lists(
            st.builds(TokenizedPair, prompt=ids, chosen=ids, rejected=ids),
            min_size=1,
            max_size=6,
            unique_by=pair_key,
        )
    )
    number = st.floats(width=32, allow_nan=False, allow_infinity=False)
    values = [
        np.array([data.draw(number) for _ in each.chosen + each.rejected], np.float32)
        for each in pairs
    ]
    with opened(folder).writer() as writer:
        for each, logps in zip(pairs, values, strict=True):
            writer.add(each, logps)
    found, damaged = opened(folder).read(TokenizedSet.from_pairs(pairs), range(len(pairs)))
    assert not damaged and found.keys() == set(range(len(pairs)))
    for index, logps in enumerate(values):
        np.testing.assert_array_equal(found[index], logps)


def test_only_what_is_asked_for_and_there(tmp_path):
    fill(tmp_path, range(10))
    assert check(tmp_path, [12, 3, 7, 11], [3, 7]) == []
    found, _ = opened(tmp_path).read(tokenized(range(10)), [2, 2, 5])
    assert found.keys() == {2, 5}
    assert opened(tmp_path).read(tokenized(range(10)), []) == ({}, [])


def test_rows_of_the_same_ids_share_one_entry(tmp_path):
    fill(tmp_path, [4])
    twice = TokenizedSet.from_pairs(
        TokenizedPair(**(pair(4)._asdict() | {"row": row}), weight=row + 1.0) for row in range(2)
    )
    found, _ = opened(tmp_path).read(twice, [0, 1])
    assert found.keys() == {0, 1}
    np.testing.assert_array_equal(found[0], found[1])
    found[0][:] = 0  # each its own memory, and writable
    np.testing.assert_array_equal(found[1], true_logps(pair(4)))


def test_the_first_value_counts_even_where_the_clock_goes_back(tmp_path, monkeypatch):
    fill(tmp_path, range(3))
    monkeypatch.setattr(shards.time, "time_ns", lambda: 1)
    with opened(tmp_path).writer() as writer:
        for row in range(3):
            writer.add(pair(row), true_logps(pair(row)) - 1)
            writer.flush()
    assert len(shard_files(tmp_path)) == 4
    assert check(tmp_path, range(3), range(3)) == []


def test_a_shard_is_written_when_it_is_full_or_old(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_PAIRS", 4)
    clock = iter(range(0, 1000, 10))  # seconds; looked at once, and once more for a first pair
    monkeypatch.setattr(store.time, "monotonic", lambda: next(clock))
    with opened(tmp_path).writer() as writer:
        for row in range(9):
            writer.add(pair(row), true_logps(pair(row)))
        assert len(shard_files(tmp_path)) == 2
        monkeypatch.setattr(store, "SHARD_SECONDS", 30.0)
        writer.add(pair(9), true_logps(pair(9)))
        assert len(shard_files(tmp_path)) == 2
        writer.add(pair(10), true_logps(pair(10)))
        assert len(shard_files(tmp_path)) == 3
    assert len(shard_files(tmp_path)) == 3  # nothing was left to write
    assert check(tmp_path, range(11), range(11)) == []


def test_an_exception_leaves_no_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), opened(tmp_path).writer() as writer:
        writer.add(pair(0), true_logps(pair(0)))
        raise KeyboardInterrupt
    assert [path.name for path in files(tmp_path)] == ["reference.json"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value, side):
    logps = true_logps(pair(7))
    logps[0 if side == "chosen" else len(pair(7).chosen)] = value
    says = f"row 7, {side} response, token 0, is {value}"
    with pytest.raises(StoreError, match=says), opened(tmp_path).writer() as writer:
        writer.add(pair(6), true_logps(pair(6)))
        writer.add(pair(7), logps)
    assert not shard_files(tmp_path)


# --- what lies in the folder


def test_no_flipped_byte_gives_a_wrong_value(tmp_path):
    fill(tmp_path, range(2))
    [path] = shard_files(tmp_path)
    content = path.read_bytes()
    for offset in range(len(content)):
        changed = bytearray(content)
        changed[offset] ^= 1 << offset % 8
        path.write_bytes(changed)
        with pytest.raises(shards.DamagedShard):
            shards.read_shard(path, KEY)
        if offset % 100 == 0:
            [line] = check(tmp_path, range(2), [])
            assert str(path) in line and "\n" not in line
    path.write_bytes(content)
    assert check(tmp_path, range(2), range(2)) == []


def test_no_truncated_shard_is_used_or_removed(tmp_path):
    fill(tmp_path, range(2))
    [path] = shard_files(tmp_path)
    content = path.read_bytes()
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        [line] = check(tmp_path, range(2), [])
        assert "its bytes are not those that were written" in line
    path.write_bytes(content + b"\0")
    assert len(check(tmp_path, range(2), [])) == 1
    fill(tmp_path, range(2))  # computed again: used although the damaged one comes first
    assert len(check(tmp_path, range(2), range(2))) == 1
    assert path.exists()


def test_foreign_files_are_left_alone(tmp_path):
    fill(tmp_path, range(2))
    [path] = shard_files(tmp_path)
    foreign = ("notes.txt", "part-0.parquet", path.name + ".bak", ".tmp-host-12-" + "0" * 16)
    for name in foreign:
        shutil.copy(path, path.with_name(name))
    assert check(tmp_path, range(2), range(2)) == []
    assert {p.name for p in files(tmp_path)} == {*foreign, path.name, "reference.json"}


def test_a_folder_in_a_shards_place_is_reported(tmp_path):
    fill(tmp_path, range(2))
    (tmp_path / KEY.name / f"{0:020d}-{'0' * 32}.parquet").mkdir()
    [line] = check(tmp_path, range(2), range(2))
    assert "cannot be read (Is a directory)" in line


def test_a_shard_that_vanishes_is_no_damage(tmp_path, monkeypatch):
    fill(tmp_path, range(2))
    [path] = shard_files(tmp_path)
    monkeypatch.setattr(store, "shard_paths", lambda folder: [path])
    path.unlink()
    assert check(tmp_path, range(2), []) == []


def test_a_shard_of_another_reference_is_not_used(tmp_path):
    """Its bytes, its keys and its numbers are all right, for other weights."""
    with opened(tmp_path, OTHER).writer() as writer:
        writer.add(pair(0), true_logps(pair(0)) - 1)
    [other] = (tmp_path / OTHER.name).glob("*.parquet")
    opened(tmp_path)
    shutil.copy(other, tmp_path / KEY.name)
    [line] = check(tmp_path, [0], [])
    assert "written for another reference" in line


def rewrite(path: Path, change) -> Path:
    """A shard whose table is `change`d and whose name is right for its bytes."""
    table = change(pq.read_table(path))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    content = sink.getvalue().to_pybytes()
    path.unlink()
    path = path.with_name(f"{path.name[:20]}-{hashlib.sha256(content).hexdigest()[:32]}.parquet")
    path.write_bytes(content)
    return path


def with_column(table: pa.Table, name: str, values: list) -> pa.Table:
    index = table.schema.get_field_index(name)
    field = table.schema.field(name)
    return table.set_column(index, field, pa.array(values, field.type))


def edited(name: str, change):
    """Edits the list that the column `name` holds in row 0."""

    def edit(table: pa.Table) -> pa.Table:
        values = table.column(name).to_pylist()
        values[0] = change(values[0])
        return with_column(table, name, values)

    return edit


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edited("tokens", lambda ids: [ids[0] + 1, *ids[1:]]), "a key is not the hash of its ids"),
        (edited("tokens", lambda ids: ids[1:]), "lengths"),
        (edited("logps", lambda logps: logps[1:]), "lengths"),
        (edited("logps", lambda logps: [float("nan"), *logps[1:]]), "not finite"),
        (edited("logps", lambda logps: [float("-inf"), *logps[1:]]), "not finite"),
        (edited("lengths", lambda n: [n[0] - 1, n[1] + 1, n[2]]), "lengths"),
        (edited("lengths", lambda n: [n[0], n[1] + n[2] + 1, -1]), "lengths"),
        (edited("lengths", lambda n: [n[0], n[2], n[1]]), "hash of its ids"),
        (edited("key", lambda key: bytes(32)), "hash of its ids"),
        (lambda table: table.slice(0, 0), "empty"),
        (lambda table: table.drop_columns(["tokens"]), "columns"),
        (lambda table: table.select(["logps", "lengths", "tokens", "key"]), "columns"),
        (lambda table: table.replace_schema_metadata({}), "another reference"),
        (
            lambda table: table.replace_schema_metadata(
                table.schema.metadata | {b"reinforcer_tp.format": b"2"}
            ),
            "another format",
        ),
        (
            lambda table: table.set_column(
                3,
                pa.field("logps", shards._list_of(pa.float64()), nullable=False),
                table.column("logps").cast(shards._list_of(pa.float64())),
            ),
            "columns",
        ),
    ],
)
def test_a_shard_is_checked_down_to_its_values(tmp_path, change, says):
    """Also where name and bytes agree: as a faulty or foreign writer would leave it."""
    fill(tmp_path, [0])  # chosen and rejected have different lengths
    assert len(pair(0).chosen) != len(pair(0).rejected)
    [path] = shard_files(tmp_path)
    assert check(tmp_path, [0], [0]) == []
    path = rewrite(path, change)
    [line] = check(tmp_path, [0], [])
    assert line.startswith(f"{path}: ") and says in line


def test_a_file_that_is_no_parquet_is_reported(tmp_path):
    opened(tmp_path)
    content = b"PAR1 not really PAR1"
    name = f"{1:020d}-{hashlib.sha256(content).hexdigest()[:32]}.parquet"
    (tmp_path / KEY.name / name).write_bytes(content)
    [line] = check(tmp_path, [0], [])
    assert "no parquet file" in line and "\n" not in line


# --- reference.json


def test_reference_json_says_whose_it_is(tmp_path):
    ReferenceStore(tmp_path, KEY, model="/models/first")
    ReferenceStore(tmp_path, KEY, model="/elsewhere/the same weights")
    content = json.loads((tmp_path / KEY.name / "reference.json").read_text())
    assert content == {
        "format": 1,
        "digest": KEY.digest,
        "numerics": "float32-v1",
        "model": "/models/first",
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[]", "format 'list', expected 1"),
        ('{"format": 2}', "format 2, expected 1"),
        ('{"format": 1, "digest": "", "numerics": 3, "model": ""}', "lacks one of"),
    ],
)
def test_a_bad_reference_json_is_refused(tmp_path, text, says):
    opened(tmp_path)
    path = tmp_path / KEY.name / "reference.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        opened(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_of_another_digest_is_refused(tmp_path):
    """The folder's name holds half of the digest; reference.json all of it."""
    opened(tmp_path)
    twin = dataclasses.replace(KEY, digest=KEY.digest[:32] + "0" * 32)
    assert twin.name == KEY.name
    with pytest.raises(ValueError, match=f"expected {twin.digest}"):
        opened(tmp_path, twin)


def test_other_numerics_are_another_folder(tmp_path):
    fill(tmp_path, range(2))
    other = opened(tmp_path, dataclasses.replace(KEY, numerics="bfloat16-v1"))
    assert other.read(tokenized(range(2)), [0, 1]) == ({}, [])


# --- disks


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_disk_that_fails_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, call, number):
    fill(tmp_path, range(2))
    before = files(tmp_path)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        if call == "open":
            patched.setattr(shards, "open", fail, raising=False)
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
    with pytest.raises(StoreError, match=r"80 MiB free.* take about 88 MiB") as error:
        own.check_space(11 * 2**20)
    assert str(own.folder) in str(error.value) and "reference.store_dir=" in str(error.value)


# --- processes


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


def test_the_store_does_not_import_torch():
    code = "import sys, reinforcer_tp.reference.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
