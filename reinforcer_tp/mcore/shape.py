"""The numbers of a Hugging Face config that decide the network, checked; and its rope."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_FAMILIES = {  # architecture -> (bias on q, k, v; norm on q and k)
    "LlamaForCausalLM": (False, False),
    "MistralForCausalLM": (False, False),
    "Qwen2ForCausalLM": (True, False),
    "Qwen3ForCausalLM": (False, True),
}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The numbers of a Hugging Face `config.json` that decide the network, checked."""

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    initializer_range: float
    max_positions: int

    def padded_vocab_size(self, tp_size: int) -> int:
        """Rows of embedding and head, the next multiple of `tp_size`."""
        return -(-self.vocab_size // tp_size) * tp_size


def model_shape(hf_config: Any) -> ModelShape:
    """Reads a transformers config object.

    Raises:
        ValueError: an architecture, activation, bias or attention window that is not built.
    """
    architecture = (hf_config.architectures or ["(none)"])[0]
    if architecture not in _FAMILIES:
        raise ValueError(
            f"model architecture {architecture!r} is not supported; expected one of "
            f"{', '.join(_FAMILIES)}; choose another policy.model_name"
        )
    qkv_bias, qk_norm = _FAMILIES[architecture]
    _refuse_unbuilt(hf_config, architecture)
    num_heads = hf_config.num_attention_heads
    return ModelShape(
        architecture=architecture,
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.intermediate_size,
        num_heads=num_heads,
        num_kv_heads=getattr(hf_config, "num_key_value_heads", None) or num_heads,
        head_dim=_head_dim(hf_config),
        vocab_size=hf_config.vocab_size,
        norm_eps=hf_config.rms_norm_eps,
        tied=bool(hf_config.tie_word_embeddings),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        initializer_range=hf_config.initializer_range,
        max_positions=hf_config.max_position_embeddings,
    )


def _head_dim(hf_config: Any) -> int:
    own = getattr(hf_config, "head_dim", None)
    return own or hf_config.hidden_size // hf_config.num_attention_heads


def _refuse_unbuilt(hf_config: Any, architecture: str) -> None:
    if getattr(hf_config, "quantization_config", None):
        raise ValueError(
            f"the weights of this {architecture} are quantized (quantization_config in its "
            "config.json), which is not built; give the float32, bfloat16 or float16 weights"
        )
    expected = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for key, value in expected.items():
        got = getattr(hf_config, key, value)
        if got != value:
            raise ValueError(f"{architecture} with {key}={got!r} is not built; expected {value!r}")
    partial = (getattr(hf_config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise ValueError(f"{architecture} with partial_rotary_factor={partial} is not built")


def rope_frequencies(hf_config: Any) -> tuple[Tensor, float]:
    """Inverse frequencies (E/2,) float32 and the factor on cos and sin, by transformers' own rules.

    Raises:
        ValueError: a rope whose frequencies change with the length of the sequence.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = hf_config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        head_dim = _head_dim(hf_config)
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return 1.0 / (parameters["rope_theta"] ** exponent), 1.0
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(
            f"rope_type {kind!r} is not built; expected default, linear, llama3 or yarn"
        )
    inverse, factor = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
    return inverse.float(), float(factor)
