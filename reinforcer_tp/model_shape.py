"""The shape of a model: where its config.json comes from and whether the layout fits it.

Imports neither torch nor transformers. Used by `--check`; training reads the model itself.
"""

import threading
from pathlib import Path

from reinforcer_tp import fp8
from reinforcer_tp.config_check import ConfigError, require, shown
from reinforcer_tp.pipeline_layout import stage_layers
from reinforcer_tp.strict_json import parse_json
from reinforcer_tp.untrusted import CONFIG_BYTES, read_json

_MAX_LAYERS = 10_000  # a config.json may say anything, and every layer is looked for

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)


def find_model_shape(
    model_name: str,
    models_dir: str | Path,
    *,
    timeout_s: float = 5.0,
    shipped_first: bool = False,
) -> tuple[dict, str]:
    """The Hugging Face config.json of a model, and in words where it came from.

    Looks in the local folder `model_name`, in the hub's cache, at the hub (at most `timeout_s`
    seconds), and last in `models_dir`/<id with / written as -->.json; `shipped_first`: there before
    anything is asked of the hub. Raises ConfigError when all
    of them fail. Not for the word `embedded`: pass the folder that stands for it.
    """
    folder = Path(model_name).expanduser()
    if folder.is_dir():
        return _read_shape(folder / "config.json", model_name), f"{folder / 'config.json'}"
    require(
        not model_name.startswith((".", "/", "~")),
        f"policy.model_name={model_name}: there is no such folder; expected a folder with a "
        f"config.json, a hub id (owner/name), or embedded",
    )
    file = Path(models_dir) / f"{model_name.replace('/', '--')}.json"
    if shipped_first and file.is_file():
        return _read_shape(file, model_name), f"{file}"
    shape, answer = _ask_hub(model_name, timeout_s)
    if shape is not None:
        return shape, answer
    require(
        file.is_file(),
        f"policy.model_name={model_name}: no such folder, {answer}, and there is no {file}; "
        f"expected a folder with a config.json, a hub id (owner/name), or embedded",
    )
    return _read_shape(file, model_name), f"{file} ({answer})"


def _read_shape(file: Path, model_name: str) -> dict:
    try:
        return read_json(file)
    except ValueError as error:
        raise ConfigError(
            f"policy.model_name={model_name}: {error}; expected the config.json of a Hugging Face "
            "model"
        ) from None


def _ask_hub(model_name: str, timeout_s: float) -> tuple[dict | None, str]:
    """The hub's config.json and its address, or None and why not.

    Runs in a daemon thread because a name lookup has no timeout of its own.
    """
    answer: list[tuple[dict | None, str]] = []
    thread = threading.Thread(
        target=lambda: answer.append(_hub_shape(model_name, timeout_s)), daemon=True
    )
    thread.start()
    thread.join(timeout_s)
    return answer[0] if answer else (None, f"the hub did not answer within {timeout_s:g} s")


def _hub_shape(model_name: str, timeout_s: float) -> tuple[dict | None, str]:
    import huggingface_hub as hub

    try:
        cached = hub.try_to_load_from_cache(model_name, "config.json")
        if isinstance(cached, str):
            return read_json(Path(cached)), cached
        url, token = hub.hf_hub_url(model_name, "config.json"), hub.get_token()
        headers = {"authorization": f"Bearer {token}"} if token else {}
        # Not hf_hub_download: offline it retries for 23 s.
        reply = hub.get_session().get(
            url, headers=headers, timeout=timeout_s, follow_redirects=True
        )
        if reply.status_code == 200:
            shape = parse_json(reply.content[: CONFIG_BYTES + 1])
            is_object = isinstance(shape, dict)
            return (shape, url) if is_object else (None, f"{url} holds no JSON object")
        advice = ": log in with `hf auth login`" if reply.status_code in (401, 403) else ""
        return None, f"the hub answered {reply.status_code}{advice}"
    except Exception as error:  # the edge to the network: any failure means "no answer from it"
        return None, f"the hub did not answer ({type(error).__name__})"


def validate_model(config, shape: dict) -> None:
    """Check the layout against a model.

    shape: the content of a Hugging Face config.json. Raises ConfigError where heads, kv groups,
    layers or positions do not fit; the vocabulary always fits (it is padded to tp).
    """
    model, megatron = config.policy.model_name, config.policy.megatron_cfg
    model_type, layers = shape.get("model_type"), shape.get("num_hidden_layers")
    require(
        not isinstance(layers, int) or layers <= _MAX_LAYERS,
        f"policy.model_name={model} has num_hidden_layers={shown(layers)}; expected at "
        f"most {_MAX_LAYERS}",
    )
    require(
        model_type in SUPPORTED_MODEL_TYPES,
        f"policy.model_name={model} is of model_type {model_type!r}, which is not built; "
        f"expected one of {', '.join(SUPPORTED_MODEL_TYPES)}",
    )
    bad = [key for key in SHAPE_KEYS if not _is_count(shape.get(key))]
    require(
        not bad,
        f"policy.model_name={model}: config.json has {', '.join(bad)} missing or not a positive "
        f"whole number; expected a complete Hugging Face config.json",
    )
    _check_tensor_split(megatron.tensor_model_parallel_size, shape)
    _check_recompute(megatron, stage_layers(megatron, shape["num_hidden_layers"]))
    fp8.check_model(config.policy, shape)
    _check_positions(config.policy.max_total_sequence_length, shape)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_tensor_split(tp: int, shape: dict) -> None:
    heads = shape["num_attention_heads"]
    groups = shape.get("num_key_value_heads") or heads
    require(
        shape.get("head_dim") is not None or shape["hidden_size"] % heads == 0,
        f"config.json: num_attention_heads={heads} does not divide "
        f"hidden_size={shape['hidden_size']} and there is no head_dim",
    )
    require(
        heads % groups == 0,
        f"config.json: num_key_value_heads={groups} does not divide num_attention_heads={heads}",
    )
    sizes = {"num_key_value_heads": groups, "num_attention_heads": heads}
    sizes["intermediate_size"] = shape["intermediate_size"]
    fitting = [n for n in range(1, groups + 1) if all(s % n == 0 for s in sizes.values())]
    for key, size in sizes.items():
        require(
            size % tp == 0,
            f"policy.megatron_cfg.tensor_model_parallel_size={tp} does not divide the model's "
            f"{key}={size}; use {_either(fitting)}",
        )


def _check_recompute(megatron, layers: list[int]) -> None:
    """Megatron runs past a chunk's last layer where a unit is not whole."""
    size = megatron.recompute_num_layers
    is_uniform = megatron.activation_checkpointing and megatron.recompute_method == "uniform"
    broken = [count for count in layers if count % size] if is_uniform else []
    require(
        not broken,
        f"policy.megatron_cfg.recompute_num_layers={size} does not divide the {(broken or [0])[0]} "
        f"layers of a pipeline stage (stages hold {', '.join(map(str, layers))}); use a divisor, "
        "1, or recompute_method=block",
    )


def _either(numbers: list[int]) -> str:
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _check_positions(length: int, shape: dict) -> None:
    positions = shape["max_position_embeddings"]
    rope = shape.get("rope_scaling") or shape.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type")) in ("linear", "yarn"):
        # These stretch the trained positions; llama3 names the stretched number itself.
        trained = rope.get("original_max_position_embeddings") or positions
        positions = max(positions, int(trained * rope.get("factor", 1.0)))
    require(
        length <= positions,
        f"policy.max_total_sequence_length={length} exceeds the model's {positions} positions "
        f"(max_position_embeddings); use at most {positions}",
    )
    # Qwen2 and Qwen3 name a window that they only apply with use_sliding_window.
    sliding = shape.get("sliding_window") if shape.get("use_sliding_window", True) else None
    layer_types = shape.get("layer_types") or ["sliding_attention"]
    require(
        sliding is None or "sliding_attention" not in layer_types or length <= sliding,
        f"policy.max_total_sequence_length={length} exceeds the model's sliding_window={sliding}: "
        f"sliding-window attention is not built yet; use at most {sliding}",
    )
