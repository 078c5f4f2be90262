"""Reference log-probs through the store: the same from every layout, a key for each change."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.reference_cases import (
    LAYOUTS,
    SIZES,
    alone,
    assert_values,
    fill_alone,
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

COUNT = len(SIZES)


def one_ulp(tensors: dict[str, torch.Tensor]) -> None:
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    weight[5, 7] = torch.nextafter(weight[5, 7], torch.tensor(np.inf))


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
    return {"model": source} | {
        name: write_variant(root / name, source, **changes)
        for name, changes in (SAME | OTHER).items()
    }


@pytest.fixture(scope="module")
def expected(folders) -> list[np.ndarray]:
    return judge(folders["model"], make_pairs())


@pytest.fixture(scope="module")
def swept_alone(folders, tmp_path_factory) -> tuple[Path, dict]:
    """(root, what a run of one process found there after its sweep)"""
    root = tmp_path_factory.mktemp("alone")
    return root, alone(fill_alone, root, str(root), folders["model"])


@pytest.fixture(scope="module")
def by_two(folders, swept_alone, tmp_path_factory) -> tuple[Path, list[dict]]:
    """(root, per rank what two processes found in each layout)"""
    root = tmp_path_factory.mktemp("two")
    return root, run_distributed(_run_layouts, 2, folders, str(swept_alone[0]), str(root))


def _run_layouts(folders: dict[str, str], alone_root: str, root: str) -> dict:
    """In one of two ranks."""
    from reinforcer_tp.reference.fill import digest_reference

    results = {}
    for name, layout in LAYOUTS.items():
        topology = open_layout(layout)
        digests = {n: digest_reference(model_files(folders[n]), topology) for n in folders}

        def fill(store: str, topology=topology, layout=layout) -> dict:
            return fill_store(store, folders["model"], topology, layout)

        results[name] = {
            "digests": digests,
            "own": fill(f"{root}/{name}"),
            "again": fill(f"{root}/{name}"),
            "of_one": fill(alone_root),
        }
    return results


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
        found = alone(fill_alone, tmp_path, str(root / layout), folders["model"])
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
    found_again = alone(fill_alone, tmp_path, str(swept_alone[0]), folders["model"])
    for index, logps in found_again["values"].items():
        np.testing.assert_array_equal(logps, before[index])
