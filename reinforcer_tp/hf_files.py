"""The Hugging Face files a run starts from and leaves behind: config.json, weights, tokenizer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforcer_tp.config import Config, ConfigError, validate_model
from reinforcer_tp.data.tokenizer import load_tokenizer
from reinforcer_tp.embedded import EmbeddedPaths
from reinforcer_tp.mcore.model import DTYPES
from reinforcer_tp.mcore.shape import ModelShape, model_shape, rope_frequencies
from reinforcer_tp.mcore.weights import RandomReader, SafetensorsReader, check_weights
from reinforcer_tp.model_shape import SUPPORTED_MODEL_TYPES
from reinforcer_tp.untrusted import inside, read_json, refuse_code

# Of a config.json: what decides the network or the ids. Anything else is left unread.
_FIELDS = (
    "architectures attention_bias attention_dropout bos_token_id dtype eos_token_id head_dim "
    "hidden_act hidden_size initializer_range intermediate_size layer_types "
    "max_position_embeddings max_window_layers mlp_bias model_type num_attention_heads "
    "num_hidden_layers num_key_value_heads pad_token_id partial_rotary_factor pretraining_tp "
    "rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window tie_word_embeddings "
    "torch_dtype use_cache use_sliding_window vocab_size"
)
_SMALL_FILES = ["*.json", "*.model", "*.jinja", "*.txt"]


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A checked model folder."""

    folder: Path
    hf_config: Any  # transformers' PretrainedConfig
    shape: ModelShape
    reader: SafetensorsReader | RandomReader


def open_model(config: Config, model_name: str, embedded: EmbeddedPaths | None) -> ModelFiles:
    """Finds a model, and checks its config and the header of every weight it should have.

    `model_name` is a local folder, a hub id, or `embedded` (which `embedded` has). Needs no
    process group; the hub's own file locks let all ranks of a node call it together.

    Raises:
        ConfigError: there is no such model, or this layout cannot hold it.
        ValueError: the architecture is not built; a tensor is missing or misshapen; a file asks for
            code or leads out of the folder.
    """
    load_weights = config.policy.load_weights
    name = embedded.model if model_name == "embedded" else model_name
    folder = _folder(name, with_weights=load_weights)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"policy.model_name={model_name}: there is no config.json in {folder}")
    hf_config = read_config(folder)
    _generation_config(folder)
    shape = model_shape(hf_config)
    rope_frequencies(hf_config)  # refuses what is not built
    validate_model(config, hf_config.to_dict())
    reader: SafetensorsReader | RandomReader = (
        SafetensorsReader(folder) if load_weights else RandomReader(shape, config.dpo.seed)
    )
    check_weights(reader, shape)
    return ModelFiles(folder=folder, hf_config=hf_config, shape=shape, reader=reader)


def read_config(folder: Path) -> Any:
    """`config_of` the folder's config.json. Raises ValueError."""
    path = inside(folder, "config.json")
    return config_of(read_json(path), path)


def config_of(content: dict[str, Any], path: Path) -> Any:
    """transformers' config of the known fields of a config.json. Raises ValueError.

    transformers itself would read any field, and some of them name code.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    refuse_code(content, path)
    if content.get("quantization_config"):
        raise ValueError(
            f"{path} has quantization_config: the weights are quantized, which is not built; give "
            "the float32, bfloat16 or float16 weights"
        )
    model_type = content.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        names = (f"{name} ({name.capitalize()}ForCausalLM)" for name in SUPPORTED_MODEL_TYPES)
        raise ValueError(
            f"{path} is of model_type {str(model_type)[:80]!r}, architectures "
            f"{str(content.get('architectures'))[:80]}; expected one of {', '.join(names)}"
        )
    fields = {name: value for name, value in content.items() if name in _FIELDS.split()}
    try:
        return CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as error:  # whatever transformers makes of what others wrote
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} is no config of transformers: {reason}") from error


def _generation_config(folder: Path) -> dict[str, Any] | None:
    path = inside(folder, "generation_config.json")
    if not path.is_file():
        return None
    content = read_json(path)
    refuse_code(content, path)
    return content


def _folder(name: str, *, with_weights: bool) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigError(
            f"policy.model_name={name}: there is no such folder; "
            "expected a folder with a config.json, a hub id (owner/name), or embedded"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = [*_SMALL_FILES, *(["*.safetensors"] if with_weights else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"policy.model_name={name}: no local folder, and the hub did not give it ({reason}); "
            "check the name, the network and `hf auth login`, or give a local folder"
        ) from error


def check_vocabulary(tokenizer: Any, *models: ModelFiles | None) -> None:
    """Raises ValueError when a model has no embedding for some of the tokenizer's tokens."""
    for files in models:
        if files is not None and len(tokenizer) > files.shape.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the model in {files.folder} embeds "
                f"{files.shape.vocab_size}; give the model's own with policy.tokenizer.name"
            )


def check_same_vocabulary(tokenizer: Any, policy: ModelFiles, reference: ModelFiles) -> None:
    """Raises ValueError when the reference has another vocabulary, or a tokenizer of other ids."""
    if policy.shape.vocab_size != reference.shape.vocab_size:
        raise ValueError(
            f"the reference in {reference.folder} embeds {reference.shape.vocab_size} tokens, the "
            f"policy in {policy.folder} {policy.shape.vocab_size}: their log-probs are over "
            "different vocabularies; give a reference of the same family with "
            "reference.model_name, or resize its embedding to the policy's"
        )
    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((reference.folder / name).is_file() for name in files):
        return
    theirs, ours = load_tokenizer(str(reference.folder)).get_vocab(), tokenizer.get_vocab()
    differing = sorted(token for token, i in ours.items() if theirs.get(token, i) != i)
    differing += sorted(ours.keys() ^ theirs.keys())
    if differing:
        token = differing[0]
        raise ValueError(
            f"the reference in {reference.folder} has another tokenizer than the policy: "
            f"{len(differing)} tokens differ, {token!r} is {theirs.get(token)} there and "
            f"{ours.get(token)} here; its log-probs would be of other texts. Give a reference of "
            "the same family with reference.model_name"
        )


def write_companions(files: ModelFiles, tokenizer: Any, precision: str, folder: Path) -> None:
    """Adds config.json, generation_config.json and the tokenizer to an exported folder."""
    files.hf_config.dtype = DTYPES[precision]
    files.hf_config.save_pretrained(folder)
    generation = _generation_config(files.folder)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
