"""A Llama in a GGUF file -> a Hugging Face folder: weights, configuration, tokenizer.

What benchmarks.smollm2 writes. Only what SmolLM2's file has is built; anything else is refused.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from benchmarks.gguf_file import Gguf, decode

CONTROL = 3  # the type of a token that stands for no text
WEIGHTS = {  # GGUF's names -> transformers'
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf: Gguf, folder: Path) -> None:
    """Writes weights (bfloat16), configuration, tokenizer and chat template into `folder`.

    ValueError where the file holds another kind of model or tokenizer than this one.
    """
    config = model_config(gguf.metadata)
    tokenizer = build_tokenizer(gguf.metadata)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(gguf.metadata))
    template = metadata_of(gguf.metadata, "tokenizer.chat_template")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    weights = {name: tensor.bfloat16() for name, tensor in hf_weights(gguf, config)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def metadata_of(metadata: dict[str, Any], key: str, *expected: Any) -> Any:
    """The value of `key`. ValueError where there is none, or none of `expected`."""
    if key not in metadata or (expected and metadata[key] not in expected):
        names = " or ".join(map(repr, expected)) or "a value"
        raise ValueError(f"GGUF: {key}={metadata.get(key)!r}; expected {names}")
    return metadata[key]


def model_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """config.json of the Llama that the metadata describes; embeddings are tied."""
    metadata_of(metadata, "general.architecture", "llama")

    def value(key: str) -> Any:
        return metadata_of(metadata, key)

    heads = value("llama.attention.head_count")
    head_size = value("llama.embedding_length") // heads
    metadata_of(metadata, "llama.rope.dimension_count", head_size)
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "dtype": "bfloat16",
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "head_dim": head_size,
        "hidden_act": "silu",
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "max_position_embeddings": value("llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": value("llama.block_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": _shortest(value("llama.attention.layer_norm_rms_epsilon")),
        "rope_parameters": {
            "rope_theta": _shortest(value("llama.rope.freq_base")),
            "rope_type": "default",
        },
        "tie_word_embeddings": True,
        "vocab_size": value("llama.vocab_size"),
    }


def _shortest(value: float) -> float:
    """The number that a float32 was written for: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def hf_weights(gguf: Gguf, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 tensor) as transformers has them. ValueError where the set is another one."""
    layer_parts = [part for part in WEIGHTS if part not in ("token_embd", "output_norm")]
    layers = range(config["num_hidden_layers"])
    expected = {f"blk.{layer}.{part}.weight" for layer in layers for part in layer_parts}
    expected |= {"token_embd.weight", "output_norm.weight"}
    if expected != gguf.tensors.keys():
        name = min(expected ^ gguf.tensors.keys())
        which = "has no" if name in expected else "also has the"
        raise ValueError(f"GGUF: the file {which} tensor {name}; expected a Llama's, tied")
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    for name, tensor in gguf.tensors.items():
        layer, part = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name).groups()
        weights = torch.from_numpy(decode(tensor))
        if part in heads:
            weights = rotary_halves(weights, config[heads[part]])
        prefix = "" if layer is None else f"model.layers.{layer}."
        yield f"{prefix}{WEIGHTS[part]}.weight", weights


def rotary_halves(weights: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q or k: a head's rotated pairs lie side by side in GGUF, in halves in transformers.

    weights (num_heads * head size, hidden size).
    """
    pairs = weights.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).reshape(weights.shape)


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE in which every digit stands alone. (transformers' reader of GGUF merges them.)

    ValueError where the file names another kind.
    """
    metadata_of(metadata, "tokenizer.ggml.model", "gpt2")
    metadata_of(metadata, "tokenizer.ggml.pre", "smollm")
    metadata_of(metadata, "tokenizer.ggml.add_bos_token", False)
    tokens = metadata_of(metadata, "tokenizer.ggml.tokens")
    types = metadata_of(metadata, "tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in metadata_of(metadata, "tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return tokenizer


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata_of(metadata, "tokenizer.ggml.tokens")
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{short}_token": tokens[metadata_of(metadata, f"tokenizer.ggml.{name}_token_id")]
        for short, name in names.items()
    }
    return special | {
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata_of(metadata, "llama.context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
