"""Reference log-probs through the store: the same from every layout, after a crash, or an error."""

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
    attempt,
    fill_store,
    judge,
    make_pairs,
    model_files,
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


def one_ulp(tensors: dict[str, torch.Tensor]) -> None:
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    weight[5, 7] = torch.nextafter(weight[5, 7], torch.tensor(np.inf))


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"][BROKEN_TOKEN] = np.nan


SAME = {  # what a model's log-probs do not depend on
    "two_files": {"num_files": 2},
    "initializer_range": {"config": lambda c: c.update(initializer_range=0.5)},
}
OTHER = {
    "weight": {"weights": one_ulp},
    "eps": {"config": lambda c: c.update(rms_norm_eps=1.1e-5)},
    "theta": {"config": lambda c: c["rope_parameters"].update(rope_theta=5001.0)},
    "heads": {"config": lambda c: c.update(num_attention_heads=8, num_key_value_heads=4,
                                           head_dim=8)},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    source = write_model(root / "model")
    cases = SAME | OTHER | {"broken": {"weights": not_a_number}}
    return {"model": source} | {
        name: write_variant(root / name, source, **changes) for name, changes in cases.items()
    }


@pytest.fixture(scope="module")
def expected(folders) -> list[np.ndarray]:
    return judge(folders["model"], make_pairs())


@pytest.fixture(scope="module")
def swept_alone(folders, tmp_path_factory) -> tuple[Path, dict]:
    """(root, what a run of one process found there after its sweep)"""
    root = tmp_path_factory.mktemp("alone")
    return root, alone(_fill_alone, root, str(root), folders["model"])


@pytest.fixture(scope="module")
def by_two(folders, swept_alone, tmp_path_factory) -> tuple[Path, list[dict]]:
    """(root, per rank what two processes found in each layout)"""
    root = tmp_path_factory.mktemp("two")
    return root, run_distributed(_run_layouts, 2, folders, str(swept_alone[0]), str(root))


def assert_values(values: dict[int, np.ndarray], expected: list[np.ndarray]) -> None:
    assert sorted(values) == list(range(len(expected)))
    for index, logps in values.items():
        assert logps.dtype == np.float32
        np.testing.assert_allclose(logps, expected[index], rtol=0, atol=2e-5)


def _fill_alone(topology, root: str, folder: str, options: dict | None = None) -> dict:
    return fill_store(root, folder, topology, **(options or {}))


def broken_pairs() -> list:
    pairs = make_pairs()
    rejected = list(pairs[BROKEN].rejected)
    rejected[1] = BROKEN_TOKEN  # the tokens behind it see it
    pairs[BROKEN] = replace(pairs[BROKEN], rejected=rejected)
    return pairs


def _run_layouts(folders: dict[str, str], alone_root: str, root: str) -> dict:
    """In one of two ranks: every layout; what goes wrong needs two writers, so dp=2."""
    from reinforcer_tp.reference.fill import digest_reference

    results = {}
    for name, layout in LAYOUTS.items():
        topology, folder = open_layout(layout), folders["model"]
        digests = {n: digest_reference(model_files(folders[n]), topology) for n in folders}

        def fill(store: str, model: str = folder, topology=topology, layout=layout, **options):
            return attempt(lambda: fill_store(store, model, topology, layout, **options))

        results[name] = {
            "digests": digests,
            "own": fill(f"{root}/{name}"),
            "again": fill(f"{root}/{name}"),
            "of_one": fill(alone_root),
            "broken": fill(f"{root}/{name}", folders["broken"], pairs=broken_pairs()),
        }
        if name == "dp2":
            rank = topology.rank
            results["blind"] = fill(alone_root if rank == 0 else f"{root}/elsewhere")
            with without_patience():
                results["apart"] = fill(f"{root}/apart{rank}")
            with late_files() if rank == 1 else nullcontext():
                results["late"] = fill(f"{root}/late")
            results["closed"] = fill(f"{root}/closed" if rank == 0 else os.devnull)
            with full_disk() if rank == 1 else nullcontext():
                results["full"] = fill(f"{root}/full")
            results["freed"] = fill(f"{root}/full")
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


def test_a_sweep_gives_what_transformers_gives(swept_alone, expected):
    _, found = swept_alone
    assert_values(found["values"], expected)
    assert (found["read"], found["swept"]) == (0, COUNT)
    assert found["tokens"] == packed_tokens(make_pairs())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_sweeps_the_same_values(by_two, expected, layout):
    """Also where each rank writes its own pairs: all of them read all."""
    ranks = [rank[layout] for rank in by_two[1]]
    for rank, found in enumerate(ranks):
        assert (found["own"]["read"], found["own"]["swept"]) == (0, COUNT)
        assert found["own"]["tokens"] == packed_tokens(make_pairs())
        if layout == "pp2" and rank == 0:  # only the last stage compares
            assert found["own"]["values"] == {}
        else:
            assert_values(found["own"]["values"], expected)
        for index, logps in found["again"]["values"].items():
            np.testing.assert_array_equal(logps, found["own"]["values"][index])
        assert (found["again"]["read"], found["again"]["swept"]) == (COUNT, 0)
        assert found["again"]["tokens"] == 0 and not found["again"]["built"]
    assert len(ranks[1]["own"]["shards"]) == (2 if layout == "dp2" else 1)


def test_layouts_read_each_others_stores(by_two, swept_alone, folders, expected, tmp_path):
    """Bit for bit, and without building the reference."""
    (_, written), (root, ranks) = swept_alone, by_two
    for layout in LAYOUTS:
        found = [rank[layout]["of_one"] for rank in ranks]
        assert all(f["tokens"] == 0 and not f["built"] and f["read"] == COUNT for f in found)
        assert found[1]["values"].keys() == written["values"].keys()
        for index, logps in found[1]["values"].items():
            np.testing.assert_array_equal(logps, written["values"][index])
    for layout in LAYOUTS:
        found = alone(_fill_alone, tmp_path, str(root / layout), folders["model"])
        assert found["tokens"] == 0 and not found["built"]
        for index, logps in found["values"].items():
            np.testing.assert_array_equal(logps, ranks[1][layout]["own"]["values"][index])
        assert_values(found["values"], expected)


def test_the_digest_is_of_the_model_alone(by_two, swept_alone):
    """Not of layout and files; one weight by one bit, norms and rope count."""
    digests = [rank[layout]["digests"] for rank in by_two[1] for layout in LAYOUTS]
    assert all(found == digests[0] for found in digests)
    own = swept_alone[1]["digest"]
    assert {name: digests[0][name] for name in ("model", *SAME)} == dict.fromkeys(
        ("model", *SAME), own
    )
    different = [own, *(digests[0][name] for name in OTHER)]
    assert len(set(different)) == len(different)


def _fill_changed(topology, root: str, folder: str) -> dict:
    """What each change of pairs or arithmetic finds in a store that has all pairs in float32."""
    pairs = make_pairs()
    first, rest = pairs[0], pairs[1:]
    chosen = [first.chosen[0] ^ 1, *first.chosen[1:]]
    head, tail = first.prompt[:-1], first.prompt[-1:]
    changed = {
        "token": replace(first, chosen=chosen),
        "prompt": replace(first, prompt=[first.prompt[0] ^ 1, *first.prompt[1:]]),
        # The same sequences; another token of them belongs to the responses.
        "mask": replace(first, prompt=head, chosen=tail + first.chosen,
                        rejected=tail + first.rejected),
        "sides": replace(first, chosen=first.rejected, rejected=first.chosen),
        "weight": replace(first, weight=7.0, margin=1.0, row=99),
    }  # fmt: skip
    found = {
        name: fill_store(root, folder, topology, pairs=[*rest, pair])
        for name, pair in changed.items()
    }
    return found | {"bfloat16": fill_store(root, folder, topology, precision="bfloat16")}


def test_tokens_mask_and_dtype_are_in_the_key(swept_alone, folders, tmp_path):
    found = alone(_fill_changed, tmp_path, str(swept_alone[0]), folders["model"])
    swept = {name: result["swept"] for name, result in found.items()}
    assert swept == {
        "token": 1, "prompt": 1, "mask": 1, "sides": 1, "weight": 0, "bfloat16": COUNT,
    }  # fmt: skip
    before = swept_alone[1]["values"]
    found_again = alone(_fill_alone, tmp_path, str(swept_alone[0]), folders["model"])
    for index, logps in found_again["values"].items():
        np.testing.assert_array_equal(logps, before[index])


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
    found = alone(_fill_alone, tmp_path, str(tmp_path), folders["model"], {"max_pairs": 3})
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
        both = list(pool.map(lambda inbox: alone(_fill_alone, inbox, root, folder), inboxes))
    third = alone(_fill_alone, tmp_path, root, folder)
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
    found = alone(_fill_alone, tmp_path, str(tmp_path), folders["model"], options)
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
    errors = [rank[layout]["broken"] for rank in by_two[1]]
    assert len(set(errors)) == 1
    error, pair = errors[0], make_pairs()[BROKEN]
    assert error.startswith("NonFiniteError: ")
    assert f"training pair of source row {pair.row}, rejected side" in error
    assert "(rank 0)" in error or "(rank 1)" in error
    if layout == "pp2":
        assert "(rank 1)" in error  # the last stage


def test_a_full_disk_of_one_rank_ends_every_rank(by_two, expected):
    """And what the other rank wrote counts afterwards."""
    _, ranks = by_two
    errors = [rank["full"] for rank in ranks]
    assert errors[0] == errors[1] and errors[0].startswith("StoreError: ")
    assert os.strerror(errno.ENOSPC) in errors[0] and "reference.store_dir=" in errors[0]
    for rank in ranks:
        assert_values(rank["freed"]["values"], expected)
    assert 0 < ranks[0]["freed"]["swept"] <= COUNT


def test_files_that_another_node_shows_late_are_waited_for(by_two, expected):
    for rank in by_two[1]:
        assert_values(rank["late"]["values"], expected)


def test_a_folder_that_a_rank_cannot_make_ends_every_rank(by_two):
    errors = [rank["closed"] for rank in by_two[1]]
    assert errors[0] == errors[1] and errors[0].startswith("StoreError: ")
    assert os.devnull in errors[0] and "reference.store_dir=" in errors[0]


def test_a_folder_that_a_rank_does_not_see_ends_every_rank(by_two):
    """Where rank 0 finds all the pairs, and where each rank wrote to a folder of its own."""
    for case, rank in (("blind", "rank 1 finds 0 of 10"), ("apart", "rank 0 finds ")):
        errors = [found[case] for found in by_two[1]]
        assert errors[0] == errors[1] and errors[0].startswith("StoreError: ")
        assert rank in errors[0] and "one folder that every node sees" in errors[0]
