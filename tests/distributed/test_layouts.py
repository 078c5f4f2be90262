"""Every pipeline layout equals transformers: log-probs, loss, gradients, norm, and one AdamW step.

The independent side is transformers' own model in plain torch: two sequences a pair, no packing,
no micro-batches.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reinforcer_tp.data.packed_batch import build_packed_batch
from tests.distributed.layouts import (
    CASES,
    CLIP,
    DECAY,
    LR,
    MODELS,
    SHAPE,
    WORLD,
    judge,
    make_pairs,
    run_cases,
)
from tests.distributed.spawn import run_distributed


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> dict[str, dict]:
    return {name: judge(name, tmp_path_factory.mktemp(name)) for name in MODELS}


@pytest.fixture(scope="module")
def results(judged, tmp_path_factory) -> list[dict]:
    folders = {name: expected["folder"] for name, expected in judged.items()}
    root = tmp_path_factory.mktemp("exports")
    found = run_distributed(run_cases, WORLD, folders, CASES, str(root), timeout_s=300)
    return [rank | {"root": root} for rank in found]


def merged(results: list[dict], case: str, key: str) -> dict[str, torch.Tensor]:
    return {n: t for rank in results for n, t in rank[case][key].items()}


@pytest.mark.parametrize("case", CASES)
def test_layouts_equal_transformers(judged, results, case):
    expected = judged[CASES[case][0]]
    logps = merged(results, case, "logps")
    assert logps.keys() == expected["logps"].keys()
    for row, values in expected["logps"].items():
        assert (logps[row] - values).abs().max() < 2e-5, row
    grads = merged(results, case, "grads")
    assert grads.keys() == expected["grads"].keys()
    for name, gradient in expected["grads"].items():
        assert (grads[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    norm = torch.stack([g.double().norm() for g in expected["grads"].values()]).norm()
    for rank in results:
        assert rank[case]["num_pairs"] == len(make_pairs())
        assert rank[case]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert rank[case]["norm"] == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_adamw_reaches_every_weight(judged, results, case):
    """AdamW's first step is sign-like: w (1 - lr decay) - lr g / (|g| + eps), g clipped."""
    model = CASES[case][0]
    before, after = read_folder(Path(judged[model]["folder"])), merged(results, case, "stepped")
    grads, norm = merged(results, case, "grads"), results[0][case]["norm"]
    assert norm > CLIP and after.keys() == grads.keys()
    for name, gradient in grads.items():
        clipped = gradient.double() * CLIP / (norm + 1e-6)
        decayed = before[name].double() * (1 - LR * DECAY * (before[name].dim() > 1))
        expected = decayed - LR * clipped / (clipped.abs() + 1e-8)
        assert (after[name] - expected).abs().max() < 2e-6, name
    if MODELS[model][1]:  # the last stage's copy of the tied weight took the same step
        shards = dict(r[case]["head"] for r in results if r[case]["head"] is not None)
        copy = torch.cat([shards[tp_rank] for tp_rank in sorted(shards)])
        assert torch.equal(copy[: SHAPE["vocab_size"]], after["model.embed_tokens.weight"])


@pytest.mark.parametrize("case", CASES)
def test_exports_equal_the_files_they_came_from(judged, results, case):
    original = read_folder(Path(judged[CASES[case][0]]["folder"]))
    exported = read_folder(results[0]["root"] / case)
    assert exported.keys() == original.keys()
    for name, values in original.items():
        assert torch.equal(values, exported[name]), name


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def test_interrupted_steps_of_an_interleaved_pipeline(results):
    for rank in results:
        found = rank["round_trip"]
        for saved, loaded in zip(found["at_save"], found["at_load"], strict=True):
            assert saved.keys() == loaded.keys() and saved
            for name, values in saved.items():
                assert torch.equal(loaded[name], values), name
        for name, values in found["uninterrupted"].items():
            assert torch.equal(found["resumed"][name], values), name
            torch.testing.assert_close(found["expected"][name], values, rtol=0, atol=2e-5)


def test_an_interleaved_pipeline_refuses_an_odd_number_of_micro_batches():
    from reinforcer_tp.mcore.schedule import Stage, forward_logps
    from reinforcer_tp.mcore.topology import Topology

    places = dict.fromkeys(("rank", "local_rank", "tp_rank", "pp_rank", "dp_rank"), 0)
    sizes = {"world_size": 2, "tp_size": 1, "pp_size": 2, "vpp_size": 2, "dp_size": 1}
    groups = dict.fromkeys(("tp_group", "pp_group", "dp_group"))
    topology = Topology(**places, **sizes, **groups, device=torch.device("cpu"))
    stage = Stage(model=None, modules=(), topology=topology, kernel_impl="auto")
    batches = [build_packed_batch([], row_length=8)] * 3
    with pytest.raises(AssertionError, match=r"3 micro-batches.* multiple of 2: add empty ones"):
        forward_logps(stage, batches)
