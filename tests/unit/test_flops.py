"""FLOPs against what torch counts of transformers' model."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from reinforcer_tp.data.packed_batch import build_packed_batch
from reinforcer_tp.data.packing import PairCost, pair_costs
from reinforcer_tp.data.tokenized import TokenizedPair
from reinforcer_tp.flops import pair_cost
from reinforcer_tp.mcore.shape import model_shape
from reinforcer_tp.peak_rates import peak_tflops


def test_flops_are_those_of_the_model():
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=300,
        architectures=["LlamaForCausalLM"],
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    length = 48
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(length)[None]).logits.sum().backward()
    counted = counter.get_total_flops()
    # Eager attention multiplies the whole square; we count the triangle that is visible.
    square, triangle = length**2, length * (length + 1) / 2
    unseen = 3 * config.num_hidden_layers * 4 * 64 * (square - triangle)
    cost = pair_cost(model_shape(config))
    ours = (cost.token + cost.response_token) * length + cost.visible_key * triangle
    # Backward of the first layer's input (an embedding) is not needed but for one product less.
    assert ours == pytest.approx(counted - unseen, rel=0.01)


def test_the_cost_of_a_pair_by_hand():
    config = LlamaConfig(
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=2,
        vocab_size=10,
        architectures=["LlamaForCausalLM"],
    )
    cost = pair_cost(model_shape(config))
    # Weights of a layer: q and o 4 x 4, k and v 4 x 2, gate, up and down 4 x 6.
    layer = 2 * 16 + 2 * 8 + 3 * 24
    # A visible key: one product with the query and one with the probability, 2 heads of size 2.
    assert cost == PairCost(
        token=3 * 2 * 2 * layer, response_token=3 * 2 * 4 * 10, visible_key=3 * 2 * 2 * 2 * 4
    )


@pytest.mark.parametrize("shared", [0, 5, 7])
def test_pair_costs_count_tokens_labels_and_keys_of_the_row(shared):
    """Against a walk over the queries, each of which sees itself and what comes before it."""
    prompt, chosen, rejected = 5, 3, 4
    keys = [*range(prompt + chosen), *range(shared, prompt + rejected)]
    cost = PairCost(token=1e6, response_token=1e3, visible_key=1.0)
    lengths = np.array([[1, 1, 1], [prompt, chosen, rejected]], dtype=np.int32)
    costs = pair_costs(lengths, np.array([0, shared]), cost)
    expected = 1e6 * len(keys) + 1e3 * (chosen + rejected) + sum(key + 1 for key in keys)
    assert costs == [1e6 * 4 + 1e3 * 2 + 6.0, expected]
    assert all(type(value) is float for value in costs)


def test_pair_costs_of_long_pairs_do_not_overflow():
    lengths = np.array([[100_000, 50_000, 60_000]], dtype=np.int32)
    cost = PairCost(token=0.0, response_token=0.0, visible_key=2.0)
    expected = 150_000 * 150_001 + 160_000 * 160_001 - 100_000 * 100_001
    assert pair_costs(lengths, np.array([100_000]), cost) == [expected]


@pytest.mark.parametrize("shared", [0, 2, 4])
def test_visible_keys_are_those_of_the_packed_row(shared):
    """Counted over the segments that attention runs on: the last query sees the last key."""
    pairs = [
        TokenizedPair(prompt=[1, 2], chosen=[3, 4, 5], rejected=[3, 4, 6, 7]),
        TokenizedPair(prompt=[1], chosen=[2], rejected=[3]),
    ]
    batch = build_packed_batch(pairs, shared=[shared, 0])
    segments = zip(batch.cu_seqlens_q.diff().tolist(), batch.cu_seqlens_kv.diff().tolist())
    seen = sum(keys - i for queries, keys in segments for i in range(queries))
    lengths = np.array([[2, 3, 4], [1, 1, 1]], dtype=np.int32)
    cost = PairCost(token=0.0, response_token=0.0, visible_key=1.0)
    assert sum(pair_costs(lengths, np.array([shared, 0]), cost)) == seen


@pytest.mark.parametrize(
    ("device_name", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 NVL", 835, 60),
        ("NVIDIA GH200 480GB", 989, 67),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA GeForce RTX 4090", 165, 82.6),
        # Other devices, or less than one, whose names have a known one in them.
        ("NVIDIA A10G", None, None),
        ("NVIDIA L40", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("Some other card", None, None),
    ],
)
def test_peak_rates_are_found_by_the_device_name(device_name, bfloat16, float32):
    assert peak_tflops(device_name, "bfloat16") == bfloat16
    assert peak_tflops(device_name, "float16") == bfloat16
    assert peak_tflops(device_name, "float32") == float32
