"""FLOPs against what torch counts of transformers' model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from reinforcer_tp.flops import peak_tflops, training_flops
from reinforcer_tp.mcore.model import model_shape


def test_training_flops_are_those_of_the_model():
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
    ours = training_flops(
        model_shape(config),
        num_tokens=length,
        num_response_tokens=length,
        sum_squared_lengths=length**2,
    )
    # Backward of the first layer's input (an embedding) is not needed but for one product less.
    assert ours == pytest.approx(counted - attention / 2, rel=0.01)


def test_peak_rates_are_found_by_the_device_name():
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert peak_tflops("Some other card") is None
