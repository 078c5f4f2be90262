"""Keys of reference log-probs: the same for the same content, another for any change of it."""

import dataclasses
import hashlib
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from reinforcer_tp.data.chat import encode_pair
from reinforcer_tp.data.pairs import PreferencePair
from reinforcer_tp.data.tokenized import TokenizedPair, TokenizedSet
from reinforcer_tp.mcore.weights import SafetensorsReader
from reinforcer_tp.reference.keys import (
    MATHS_VERSION,
    ReferenceKey,
    flat_keys,
    numerics,
    pair_key,
    reference_digest,
    tensor_digests,
)
from tests.unit.toy_tokenizer import CHATML, toy_tokenizer

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=6)
PAIRS = st.builds(TokenizedPair, prompt=IDS, chosen=IDS, rejected=IDS)
MATHS = {"num_layers": 2, "norm_eps": 1e-5, "rope": {"rope_type": "default", "rope_theta": 1e4}}


@given(PAIRS)
def test_the_key_is_the_hash_of_lengths_and_ids(pair):
    """Spelled out with struct: little-endian int32, three lengths and then the ids."""
    sides = (pair.prompt, pair.chosen, pair.rejected)
    numbers = [*map(len, sides), *pair.prompt, *pair.chosen, *pair.rejected]
    expected = hashlib.sha256(struct.pack(f"<{len(numbers)}i", *numbers)).digest()
    assert pair_key(pair) == expected


@given(st.lists(PAIRS, min_size=1, max_size=8), st.data())
def test_the_keys_of_a_set_are_those_of_its_pairs(pairs, data):
    whole = TokenizedSet.from_pairs(pairs)
    rows = data.draw(st.lists(st.integers(0, len(pairs) - 1)))
    expected = [pair_key(pair) for pair in pairs]
    assert flat_keys(whole.tokens, whole.lengths()) == expected
    assert flat_keys(whole.tokens, whole.lengths(), rows) == [expected[row] for row in rows]


def test_a_set_on_disk_has_the_same_keys(tmp_path):
    pairs = TokenizedSet.from_pairs(
        TokenizedPair(prompt=[row, 1], chosen=[2, 3], rejected=[4] * row) for row in range(5)
    )
    pairs.save(tmp_path)
    opened = TokenizedSet.open(tmp_path)
    assert flat_keys(opened.tokens, opened.lengths()) == [pair_key(pair) for pair in pairs]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": [1, 2, 4]},
        {"chosen": [5]},
        {"rejected": [6, 7, 9]},
        {"chosen": [6, 7, 8], "rejected": [4, 5]},  # the sides exchanged
        {"prompt": [1, 2], "chosen": [3, 4, 5]},  # the same ids: what is a response differs
        {"chosen": [4, 5, 6], "rejected": [7, 8]},
    ],
)
def test_another_token_or_mask_is_another_key(change):
    pair = TokenizedPair(prompt=[1, 2, 3], chosen=[4, 5], rejected=[6, 7, 8])
    assert pair_key(dataclasses.replace(pair, **change)) != pair_key(pair)


def test_another_chat_template_is_another_key():
    def side(text):
        return [{"role": "assistant", "content": text}]

    row = PreferencePair(
        prompt=[{"role": "user", "content": "Hi"}], chosen=side("Hello"), rejected=side("No")
    )

    def key(template):
        ids = encode_pair(row, toy_tokenizer(chat_template=template))
        return pair_key(TokenizedPair(prompt=ids.prompt, chosen=ids.chosen, rejected=ids.rejected))

    assert key(CHATML) == key(CHATML)
    assert key(CHATML) != key(CHATML.replace("{{ m['role'] }}\n", "{{ m['role'] }}: "))


def test_what_does_not_reach_the_reference_is_not_in_the_key():
    pair = TokenizedPair(prompt=[1], chosen=[2], rejected=[3])
    assert pair_key(dataclasses.replace(pair, weight=0.5, row=7)) == pair_key(pair)


def test_numerics_name_precision_and_version():
    assert numerics("bfloat16") == numerics("bfloat16", "off") == f"bfloat16-v{MATHS_VERSION}"
    assert numerics("bfloat16", "hybrid") == f"bfloat16_fp8_hybrid-v{MATHS_VERSION}"
    key = ReferenceKey("0123456789abcdef" * 4, "float32-v1")
    assert key.name == "0123456789abcdef0123456789abcdef-float32-v1"


def weights(dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (4, 6), "b.bias": (5,), "c.weight": (3, 3), "d.bias": (1,)}
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def digests_of(tensors: dict[str, torch.Tensor], folder) -> dict[str, str]:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return tensor_digests(SafetensorsReader(folder), sorted(tensors))


def test_a_tensor_digest_is_the_hash_of_dtype_shape_and_bytes(tmp_path):
    tensor = torch.tensor([[1.0, -2.5]])
    [digest] = digests_of({"w": tensor}, tmp_path / "model").values()
    expected = hashlib.sha256(b"torch.float32 [1, 2] " + struct.pack("<2f", 1.0, -2.5))
    assert digest == expected.hexdigest()


def test_files_and_order_do_not_change_a_reference(tmp_path):
    tensors = weights()
    whole = digests_of(tensors, tmp_path / "whole")
    folder = tmp_path / "sharded"
    folder.mkdir()
    for index, names in enumerate((["c.weight", "b.bias"], ["d.bias", "a.weight"])):
        save_file({n: tensors[n] for n in names}, folder / f"model-{index}.safetensors")
    reader = SafetensorsReader(folder)
    # As ranks share the work: some names each, gathered in any order.
    sharded = tensor_digests(reader, ["d.bias", "b.bias"]) | tensor_digests(
        reader, ["c.weight", "a.weight"]
    )
    other_order = dict(reversed(MATHS.items()))
    assert reference_digest(sharded, other_order) == reference_digest(whole, MATHS)


def flipped(tensor: torch.Tensor) -> torch.Tensor:
    """The last value differs in its last bit."""
    whole = tensor.clone()
    bits = whole.view(-1).view(torch.int32)
    bits[-1] ^= 1
    return whole


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t | {"a.weight": flipped(t["a.weight"])},
        lambda t: t | {"d.bias": flipped(t["d.bias"])},
        lambda t: t | {"a.weight": t["a.weight"].reshape(6, 4)},
        lambda t: t | {"c.weight": t["c.weight"].T},
        lambda t: {n: w.to(torch.bfloat16) for n, w in t.items()},
        lambda t: {n.replace("b.bias", "e.bias"): w for n, w in t.items()},
    ],
    ids=["one bit", "one bit of a small tensor", "shape", "transposed", "dtype", "name"],
)
def test_any_change_of_the_weights_is_another_reference(tmp_path, change):
    before = reference_digest(digests_of(weights(), tmp_path / "before"), MATHS)
    changed = {n: w.contiguous() for n, w in change(weights()).items()}
    assert reference_digest(digests_of(changed, tmp_path / "after"), MATHS) != before


@pytest.mark.parametrize(
    "change", [{"norm_eps": 1e-6}, {"rope": {"rope_type": "default", "rope_theta": 5e5}}]
)
def test_another_network_over_the_same_weights_is_another_reference(tmp_path, change):
    digests = digests_of(weights(), tmp_path / "model")
    assert reference_digest(digests, MATHS | change) != reference_digest(digests, MATHS)


def test_ids_that_are_no_int32_are_refused():
    with pytest.raises((OverflowError, AssertionError)):
        pair_key(TokenizedPair(prompt=[2**31], chosen=[1], rejected=[1]))
    with pytest.raises(AssertionError):
        flat_keys(np.zeros(3, np.int64), np.ones((1, 3), np.int32))
