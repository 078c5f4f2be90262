"""Model folders that must not be trained on are refused by name."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from reinforcer_tp.mcore.shape import model_shape, rope_frequencies
from reinforcer_tp.mcore.weights import SafetensorsReader

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "architectures": ["LlamaForCausalLM"],
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
    ],
)
def test_networks_that_are_not_built(change, says):
    with pytest.raises(ValueError, match=says):
        model_shape(LlamaConfig(**(SHAPE | change)))


def test_a_rope_that_depends_on_the_length_is_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="'dynamic' is not built"):
        rope_frequencies(LlamaConfig(**SHAPE, rope_parameters=rope))


def test_quantized_tensors_are_refused(tmp_path):
    """An FP8 weight would pass every check of names and shapes, and lose its scale."""
    save_file({"w": torch.zeros(2, 3).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="F8_E4M3"):
        SafetensorsReader(tmp_path).check("w", (2, 3))


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index_is_named(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        SafetensorsReader(tmp_path)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "secret.safetensors")
    index = '{"weight_map": {"w": "../secret.safetensors"}}'
    (inside / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="expected the name of a file in it"):
        SafetensorsReader(inside)
