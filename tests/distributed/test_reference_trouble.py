"""Reference log-probs through the store when a process dies, a disk fails or a number is none."""

import errno
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from tests.distributed.reference_cases import (
    BROKEN_TOKEN,
    LAYOUTS,
    SIZES,
    alone,
    assert_values,
    attempt,
    fill_alone,
    fill_store,
    judge,
    make_pairs,
    open_layout,
    packed_tokens,
    write_model,
    write_variant,
)
from tests.distributed.spawn import run_distributed
from tests.unit.reference_pairs import POINTS

COUNT = len(SIZES)
BROKEN = 6  # index of the pair with BROKEN_TOKEN, in its rejected response
EXIT = 9
SHARD = 2  # pairs in a shard of the interrupted sweeps


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"][BROKEN_TOKEN] = np.nan


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    source = write_model(root / "model")
    return {
        "model": source,
        "broken": write_variant(root / "broken", source, weights=not_a_number),
    }


@pytest.fixture(scope="module")
def expected(folders) -> list[np.ndarray]:
    return judge(folders["model"], make_pairs())


@pytest.fixture(scope="module")
def by_two(folders, tmp_path_factory) -> list[dict]:
    """Per rank, what went wrong with two processes."""
    return run_distributed(_run_trouble, 2, folders, str(tmp_path_factory.mktemp("two")))


def broken_pairs() -> list:
    pairs = make_pairs()
    rejected = list(pairs[BROKEN].rejected)
    rejected[1] = BROKEN_TOKEN  # the tokens behind it see it
    pairs[BROKEN] = replace(pairs[BROKEN], rejected=rejected)
    return pairs


def _run_trouble(folders: dict[str, str], root: str) -> dict:
    """In one of two ranks; dp=2 comes last, where both write."""
    results = {}
    for name, layout in LAYOUTS.items():
        topology = open_layout(layout)

        def fill(store: str, model: str = "model", topology=topology, layout=layout, **options):
            folder = f"{root}/{store}"
            return attempt(lambda: fill_store(folder, folders[model], topology, layout, **options))

        results[name] = fill("broken", "broken", pairs=broken_pairs())
    assert topology.dp_size == 2
    rank = topology.rank
    fill("whole")
    results["blind"] = fill("whole" if rank == 0 else "elsewhere")
    with without_patience():
        results["apart"] = fill(f"apart{rank}")
    with late_files() if rank == 1 else nullcontext():
        results["late"] = fill("late")
    with full_disk() if rank == 1 else nullcontext():
        results["full"] = fill("full")
    results["freed"] = fill("full")
    if rank == 1:
        Path(root, "file").write_text("")
    results["closed"] = fill("closed" if rank == 0 else "file")
    return results


def full_disk():
    """No room for shards, on this rank."""
    from reinforcer_tp.reference import shards

    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return mock.patch.object(shards, "write_whole", side_effect=error)


def without_patience():
    """What other nodes have written is seen at once or not at all."""
    from reinforcer_tp.reference import fill

    return mock.patch.object(fill, "PATIENCE_S", 0.0)


def late_files():
    """This rank's first look at the store shows nothing, as a network file system may."""
    from reinforcer_tp.reference.store import ReferenceStore

    own, looks = ReferenceStore.read, []

    def read(store, pairs, rows):
        looks.append(1)
        return ({}, []) if len(looks) == 1 else own(store, pairs, rows)

    return mock.patch.object(ReferenceStore, "read", read)


def _die_sweeping(topology, root: str, folder: str, point: str) -> None:
    """Dies at `point` of the third shard, or when the fifth pair comes."""
    from reinforcer_tp.reference import store

    store.SHARD_PAIRS = SHARD
    write, add, written, added = store.write_shard, store.ShardWriter.add, [], []

    def write_shard(*arguments):
        written.append(1)
        if len(written) == 3 and point in POINTS:
            setattr(*POINTS[point])
        return write(*arguments)

    def add_pair(*arguments):
        added.append(1)
        if len(added) == 5 and point == "between shards":
            os._exit(EXIT)
        return add(*arguments)

    store.write_shard, store.ShardWriter.add = write_shard, add_pair
    fill_store(root, folder, topology, max_pairs=3)


@pytest.mark.parametrize("point", [*POINTS, "between shards"])
def test_a_killed_sweep_goes_on_where_it_stopped(point, folders, expected, tmp_path):
    """At most the shard that was being written is computed again, and no value is wrong."""
    code = -9 if point in POINTS else EXIT
    alone(_die_sweeping, tmp_path, str(tmp_path), folders["model"], point, exit_code=code)
    found = alone(fill_alone, tmp_path, str(tmp_path), folders["model"], {"max_pairs": 3})
    stored = 3 * SHARD if point == "after the rename" else 2 * SHARD
    assert (found["read"], found["swept"]) == (stored, COUNT - stored)
    by_length = sorted(make_pairs(), key=lambda p: -packed_tokens([p]))  # the longest come first
    assert found["tokens"] == packed_tokens(by_length[stored:])
    assert_values(found["values"], expected)
    assert found["messages"] == []


def test_two_runs_fill_one_store_at_once(folders, expected, tmp_path):
    """Each may sweep what the other has not written yet; later runs read one value a pair."""
    inboxes = [tmp_path / str(i) for i in range(2)]
    for inbox in inboxes:
        inbox.mkdir()
    root, folder = str(tmp_path / "store"), folders["model"]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda inbox: alone(fill_alone, inbox, root, folder), inboxes))
    third = alone(fill_alone, tmp_path, root, folder)
    assert third["swept"] == 0 and third["messages"] == []
    for found in (*both, third):
        assert_values(found["values"], expected)


def test_a_damaged_shard_is_named_and_computed_again(folders, expected, tmp_path):
    options = {"max_pairs": 3}
    alone(_fill_in_small_shards, tmp_path, str(tmp_path), folders["model"])
    shard = sorted(tmp_path.glob("*/*.parquet"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 4] = struct.pack("<f", -1.5)
    shard.write_bytes(content)
    found = alone(fill_alone, tmp_path, str(tmp_path), folders["model"], options)
    assert (found["read"], found["swept"]) == (COUNT - SHARD, SHARD)
    assert len(found["messages"]) == 1 and str(shard) in found["messages"][0]
    assert_values(found["values"], expected)


def _fill_in_small_shards(topology, root: str, folder: str) -> None:
    from reinforcer_tp.reference import store

    store.SHARD_PAIRS = SHARD
    fill_store(root, folder, topology, max_pairs=3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_log_prob_that_is_not_finite_ends_every_rank(by_two, layout):
    """Nothing of a pair that was swept with it is stored as a wrong value."""
    errors = [rank[layout] for rank in by_two]
    assert len(set(errors)) == 1
    error, pair = errors[0], make_pairs()[BROKEN]
    assert error.startswith("NonFiniteError: ")
    assert f"training pair of source row {pair.row}, rejected side" in error
    assert "(rank 0)" in error or "(rank 1)" in error
    if layout == "pp2":
        assert "(rank 1)" in error  # the last stage


def test_a_full_disk_of_one_rank_ends_every_rank(by_two, expected):
    """And what the other rank wrote counts afterwards."""
    errors = [rank["full"] for rank in by_two]
    assert errors[0] == errors[1] and errors[0].startswith("StoreError: ")
    assert os.strerror(errno.ENOSPC) in errors[0] and "reference.store_dir=" in errors[0]
    for rank in by_two:
        assert_values(rank["freed"]["values"], expected)
    assert 0 < by_two[0]["freed"]["swept"] <= COUNT


def test_files_that_another_node_shows_late_are_waited_for(by_two, expected):
    for rank in by_two:
        assert_values(rank["late"]["values"], expected)


def test_a_folder_that_a_rank_cannot_make_ends_every_rank(by_two):
    errors = [rank["closed"] for rank in by_two]
    assert errors[0] == errors[1] and errors[0].startswith("StoreError: ")
    assert "/file/" in errors[0] and "reference.store_dir=" in errors[0]


def test_a_folder_that_a_rank_does_not_see_ends_every_rank(by_two):
    """Where rank 0 finds all the pairs, and where each rank wrote to a folder of its own."""
    for case, rank in (("blind", "rank 1 finds 0 of 10"), ("apart", "rank 0 finds ")):
        errors = [found[case] for found in by_two]
        assert errors[0] == errors[1] and errors[0].startswith("StoreError: ")
        assert rank in errors[0] and "one folder that every node sees" in errors[0]
