"""verify recomputes what is stored, and finds one wrong number among right ones."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from reinforcer_tp.embedded import ensure_embedded
from reinforcer_tp.mcore.shape import model_shape
from reinforcer_tp.mcore.weights import SafetensorsReader, hf_tensors
from reinforcer_tp.reference import fill as filling
from reinforcer_tp.reference import store
from reinforcer_tp.reference.__main__ import main
from reinforcer_tp.reference.keys import numerics, reference_digest, tensor_digests
from reinforcer_tp.reference.store import ReferenceKey, ReferenceStore
from tests.unit.reference_pairs import KEY, Pair, fill, lines_of, one_error, pair, true_logps


def model_pair(row: int) -> Pair:
    generator = np.random.default_rng(row)
    sizes = generator.integers(2, 9, 3)
    return Pair(*(generator.integers(0, 512, size).tolist() for size in sizes), row)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return Path(ensure_embedded(str(tmp_path_factory.mktemp("embedded"))).model)


def key_of(folder: Path) -> ReferenceKey:
    hf_config = AutoConfig.from_pretrained(folder)
    shape = model_shape(hf_config)
    digests = tensor_digests(SafetensorsReader(folder), list(hf_tensors(shape)))
    files = type("Files", (), {"hf_config": hf_config, "shape": shape})
    return ReferenceKey(reference_digest(digests, filling.maths_of(files)), numerics("float32"))


@pytest.fixture(scope="module")
def stored(model, tmp_path_factory) -> Path:
    """Ten pairs with the log-probs that transformers computes in float64."""
    root = tmp_path_factory.mktemp("store")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    with ReferenceStore(root, key_of(model), model=str(model)).writer() as writer:
        for row in range(10):
            of = model_pair(row)
            writer.add(of, np.concatenate([side_logps(network, of.prompt, s) for s in of[1:3]]))
    return root


@torch.no_grad()
def side_logps(network, prompt: list[int], response: list[int]) -> np.ndarray:
    logits = network(torch.tensor([prompt + response])).logits[0]
    logps = logits.double().log_softmax(-1)[len(prompt) - 1 : -1]
    return logps.gather(1, torch.tensor(response)[:, None])[:, 0].float().numpy()


def test_verify_agrees_with_transformers(stored, capsys):
    assert main(["verify", str(stored), "--pairs", "6"]) == 0
    first, worst = lines_of(capsys)
    assert first.startswith("agrees: 6 pairs")
    assert "token" in worst and " stored, " in worst


def test_verify_finds_one_wrong_number(stored, tmp_path, capsys, monkeypatch):
    """1e-3 off in one token of one pair, named."""
    folder = stored / key_of_store(stored).name
    shard = store.read_shard(next(folder.glob("*.parquet")), key_of_store(stored))
    with ReferenceStore(tmp_path, key_of_store(stored), model=str(folder)).writer() as writer:
        begin = 0
        for row, count in enumerate(shard.num_responses.tolist()):
            logps = shard.logps[begin : begin + count].copy()
            logps[-1] += 1e-3 * (row == 4)
            writer.add(model_pair(row), logps)
            begin += count
    model = store.read_description(folder).model
    assert main(["verify", str(tmp_path), "--pairs", "99", "--model", model]) == 1
    first, worst, advice = lines_of(capsys)
    of = model_pair(4)
    assert first.startswith("DIFFERS: 10 pairs, per response token at most 1.0e-03")
    assert f"rejected token {len(of.rejected) - 1} of a pair of {list(map(len, of[:3]))}" in worst
    assert f"prune {tmp_path} --reference {folder.name}" in advice


def key_of_store(root: Path) -> ReferenceKey:
    [folder] = store.reference_folders(root)
    return store.read_description(folder).key


def test_verify_refuses_other_weights(stored, model, tmp_path, capsys):
    changed = tmp_path / "model"
    shutil.copytree(model, changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-7
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    assert main(["verify", str(stored), "--model", str(changed)]) == 65
    assert "are not those of this reference" in one_error(capsys)
    assert main(["verify", str(stored), "--model", str(tmp_path / "absent")]) == 78
    assert "there is no such folder" in one_error(capsys)


def test_verify_says_what_it_could_not_look_at(stored, tmp_path, capsys):
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    key = key_of_store(tmp_path)
    (tmp_path / key.name / f"{1:020d}-{'0' * 32}.parquet").write_bytes(b"")
    assert main(["verify", str(tmp_path), "--pairs", "2"]) == 65
    lines = lines_of(capsys)
    assert lines[0].startswith("agrees: 2 pairs") and lines[-1].startswith("damaged: ")


def test_verify_looks_at_the_values_that_a_run_reads(stored, tmp_path):
    """The oldest of a pair: later ones, wrong here, are of no account."""
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    with ReferenceStore(tmp_path, key_of_store(tmp_path), model="").writer() as writer:
        for row in range(10):
            writer.add(model_pair(row), -true_logps(model_pair(row)))
    assert main(["verify", str(tmp_path)]) == 0


def test_verify_of_old_arithmetic_and_of_nothing(tmp_path, capsys):
    old = ReferenceKey(KEY.digest, "float32-v0")
    own = ReferenceStore(tmp_path, old, model="/models/m")
    assert main(["verify", str(tmp_path)]) == 65
    assert "holds no pair" in one_error(capsys)
    with own.writer() as writer:
        writer.add(pair(0), true_logps(pair(0)))
    assert main(["verify", str(tmp_path)]) == 65
    assert "computed as float32-v0" in one_error(capsys)
    fill(tmp_path, [0])
    assert main(["verify", str(tmp_path)]) == 78
    assert old.name in one_error(capsys)


def test_what_was_computed_in_fp8_is_not_compared(tmp_path, capsys):
    key = ReferenceKey(KEY.digest, numerics("bfloat16", "hybrid"))
    with ReferenceStore(tmp_path, key, model="/models/m").writer() as writer:
        writer.add(pair(0), true_logps(pair(0)))
    assert main(["verify", str(tmp_path)]) == 65
    assert "computed in FP8 (bfloat16_fp8_hybrid-v1)" in one_error(capsys)


def test_the_sample_is_random_and_repeatable(stored):
    from reinforcer_tp.reference.verify import sample

    [folder] = store.reference_folders(stored)
    description = store.read_description(folder)

    def drawn(seed: int) -> set[tuple[int, ...]]:
        found, _ = sample(folder, description, 4, seed)
        assert len(found) == 4
        return {tuple(each.tokens) for each in found}

    assert drawn(0) == drawn(0)
    assert set().union(*(drawn(seed) for seed in range(12))) == {
        tuple(ids for side in model_pair(row)[:3] for ids in side) for row in range(10)
    }
