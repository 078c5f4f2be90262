"""The store gives back what was put in; reference.json says whose it is."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforcer_tp.data.tokenized import TokenizedPair, TokenizedSet
from reinforcer_tp.reference import shards, store
from reinforcer_tp.reference.keys import pair_key
from reinforcer_tp.reference.store import ReferenceStore, read_description
from tests.unit.reference_pairs import (
    KEY,
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
def test_numbers_that_are_not_finite_are_never_written(tmp_path, value):
    """The sweep has looked before (test_reference_trouble): this is the last line of defence."""
    logps = true_logps(pair(7))
    logps[-1] = value
    with pytest.raises(AssertionError), opened(tmp_path).writer() as writer:
        writer.add(pair(6), true_logps(pair(6)))
        writer.add(pair(7), logps)
    assert not shard_files(tmp_path)


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


def test_a_local_model_is_kept_as_an_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, key, expected in (
        ("model", KEY, str(tmp_path / "model")),
        ("owner/name", dataclasses.replace(KEY, digest="00" * 32), "owner/name"),
    ):
        own = ReferenceStore(tmp_path / "store", key, model=name)
        assert read_description(own.folder).model == expected


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


def test_the_store_does_not_import_torch():
    code = "import sys, reinforcer_tp.reference.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
