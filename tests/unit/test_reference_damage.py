"""Whatever lies in a reference's folder, no reader takes a wrong number from it."""

import hashlib
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reinforcer_tp.reference import shards, store
from reinforcer_tp.reference.store import ReferenceKey
from tests.unit.reference_pairs import (
    KEY,
    check,
    files,
    fill,
    opened,
    pair,
    shard_files,
    true_logps,
)

OTHER = ReferenceKey("5b" * 32, "float32-v1")


def test_no_flipped_byte_gives_a_wrong_value(tmp_path):
    fill(tmp_path, range(2))
    [path] = shard_files(tmp_path)
    content = path.read_bytes()
    for offset in range(0, len(content), 3):
        changed = bytearray(content)
        changed[offset] ^= 1 << offset % 8
        path.write_bytes(changed)
        with pytest.raises(shards.DamagedShard):
            shards.read_shard(path, KEY)
        if offset % 99 == 0:
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
