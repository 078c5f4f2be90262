"""FLOPs against what torch counts of transformers' model."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from reinforcer_tp.data.packing import PairCost, pair_costs
from reinforcer_tp.flops import pair_cost, peak_tflops
from reinforcer_tp.mcore.shape import model_shape


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
    # Eager attention multiplies the whole square; we count the half that is visible.
    attention = 3 * config.num_hidden_layers * 4 * 64 * length**2
    cost = pair_cost(model_shape(config))
    ours = (cost.token + cost.response_token) * length + cost.visible_key * length**2 / 2
    # Backward of the first layer's input (an embedding) is not needed but for one product less.
    assert ours == pytest.approx(counted - attention / 2, rel=0.01)


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
    # On average half a key of its own: (n + 1/2) summed over n.
    expected = 1e6 * len(keys) + 1e3 * (chosen + rejected) + sum(key + 0.5 for key in keys)
    assert costs == [1e6 * 4 + 1e3 * 2 + 4.0, expected]
    assert all(type(value) is float for value in costs)


def test_pair_costs_of_long_pairs_do_not_overflow():
    lengths = np.array([[100_000, 50_000, 60_000]], dtype=np.int32)
    cost = PairCost(token=0.0, response_token=0.0, visible_key=2.0)
    expected = 150_000**2 + 160_000**2 - 100_000**2
    assert pair_costs(lengths, np.array([100_000]), cost) == [expected]


def test_peak_rates_are_found_by_the_device_name():
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert peak_tflops("Some other card") is None
