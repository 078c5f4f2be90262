"""Whether a layout fits a model, and where the model's config.json comes from."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from reinforcer_tp.config import ConfigError, find_model_shape, load_config, validate_model
from reinforcer_tp.mcore.shape import model_shape, rope_frequencies

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# But for the model that benchmarks.smollm2 makes.
HUB_CONFIGS = sorted(set(CONFIGS.glob("dpo_*.yaml")) - {CONFIGS / "dpo_smollm2.yaml"})
MEGATRON = "policy.megatron_cfg"
# Parameters that the hub counts in the models' safetensors.
PARAMETERS = {
    "Qwen--Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen--Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen--Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen--Qwen3-32B": 32_762_123_264,
    "Qwen--Qwen3-8B": 8_190_735_360,
    "meta-llama--Llama-3.1-405B-Instruct": 405_853_388_800,
    "meta-llama--Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama--Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama--Llama-3.3-70B-Instruct": 70_553_706_496,
}
SHAPE = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "num_hidden_layers": 5,
    "vocab_size": 321,
}


def config_with(**keys):
    """A Config with keys of policy.megatron_cfg, or max_total_sequence_length=."""
    length = keys.pop("max_total_sequence_length", 128)
    overrides = ["policy.model_name=m", f"policy.max_total_sequence_length={length}"]
    return load_config(None, overrides + [f"{MEGATRON}.{k}={v}" for k, v in keys.items()])


def test_every_shape_file_has_a_config():
    names = [load_config(str(path), []).policy.model_name for path in HUB_CONFIGS]
    files = {path.stem for path in (CONFIGS / "models").glob("*.json")}
    assert {name.replace("/", "--") for name in names} == files == PARAMETERS.keys()


@pytest.mark.parametrize("path", HUB_CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_fit_their_models(path):
    config = load_config(str(path), [])
    config.validate(config.planned_world_size)
    name = config.policy.model_name.replace("/", "--")
    shape = json.loads((CONFIGS / "models" / f"{name}.json").read_text())
    validate_model(config, shape)
    budget, length = config.policy.micro_batch_tokens, config.policy.max_total_sequence_length
    assert budget >= 2 * length, "the longest pair would not fit a micro-batch"


@pytest.mark.parametrize("name", PARAMETERS)
def test_shape_files_have_the_published_sizes(name):
    shape = json.loads((CONFIGS / "models" / f"{name}.json").read_text())
    hf_config = AutoConfig.for_model(**shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    assert type(model).__name__ == shape["architectures"][0]
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[name]
    read = model_shape(hf_config)
    assert read.vocab_size == shape["vocab_size"] and read.tied == shape["tie_word_embeddings"]
    frequencies, scale = rope_frequencies(hf_config)
    assert len(frequencies) == read.head_dim // 2 and scale == 1.0
    longest = 2 * math.pi / frequencies[-1]  # tokens; rope_scaling stretches it
    theta, stretch = shape["rope_theta"], (shape.get("rope_scaling") or {"factor": 1})["factor"]
    assert longest == pytest.approx(2 * math.pi * theta ** (1 - 2 / read.head_dim) * stretch)


REFUSED = [
    ({"tensor_model_parallel_size": 3}, {}, ("=3", "num_key_value_heads=4", "1, 2 or 4")),
    # fewer kv groups than tp, though tp divides the heads
    ({"tensor_model_parallel_size": 6}, {}, ("=6", "num_key_value_heads=4")),
    (
        {"tensor_model_parallel_size": 4},
        {"intermediate_size": 98},
        ("intermediate_size=98", "1 or 2"),
    ),
    ({"tensor_model_parallel_size": 2}, {"num_key_value_heads": 1}, ("num_key_value_heads=1",)),
    ({"pipeline_model_parallel_size": 2}, {}, ("5 layers", "first_pipeline_stage=3")),
    ({"pipeline_model_parallel_size": 8}, {}, ("5 layers", "at most 5")),
    (
        {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Ett|ttL"},
        {},
        ("Ett|ttL has 4 layers", "has 5", "for example Ett|tttL"),
    ),
    (
        {"pipeline_model_parallel_size": 3, "num_layers_in_first_pipeline_stage": 2},
        {},
        ("num_layers_in_first_pipeline_stage=2", "leave 3 for 2"),
    ),
    (
        {
            "pipeline_model_parallel_size": 2,
            "num_layers_in_first_pipeline_stage": 3,
            "num_layers_in_last_pipeline_stage": 3,
        },
        {},
        ("the two stages hold 6 layers, but the model has 5",),
    ),
    ({"max_total_sequence_length": 257}, {}, ("=257", "256 positions")),
    ({}, {"sliding_window": 100}, ("=128", "sliding_window=100", "not built")),
    ({}, {"num_key_value_heads": 5}, ("num_key_value_heads=5",)),
    ({}, {"hidden_size": 50}, ("hidden_size=50", "head_dim")),
    ({}, {"model_type": "mamba"}, ("mamba", "llama")),
    ({}, {"model_type": None}, ("None", "llama")),
    ({}, {"vocab_size": "big"}, ("vocab_size", "config.json")),
    ({}, {"num_hidden_layers": None}, ("num_hidden_layers", "config.json")),
]


@pytest.mark.parametrize(("keys", "change", "parts"), REFUSED)
def test_layouts_that_do_not_fit_are_refused(keys, change, parts):
    with pytest.raises(ConfigError) as caught:
        validate_model(config_with(**keys), SHAPE | change)
    for part in parts:
        assert part in str(caught.value)


FITS = [
    ({"tensor_model_parallel_size": 4}, {}),  # the odd vocabulary is padded
    ({"tensor_model_parallel_size": 12}, {"num_key_value_heads": None}),  # no grouped queries
    ({"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 3}, {}),
    ({"pipeline_model_parallel_size": 5}, {}),
    ({}, {"hidden_size": 50, "head_dim": 4}),
    ({"max_total_sequence_length": 256}, {}),
    ({"max_total_sequence_length": 512}, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    (
        {"max_total_sequence_length": 512},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    ({}, {"model_type": "mistral", "sliding_window": None}),
    ({}, {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}),
    ({}, {"sliding_window": 128}),
    ({}, {"sliding_window": 8, "layer_types": ["full_attention"] * 5}),
]


@pytest.mark.parametrize(("keys", "change"), FITS)
def test_layouts_that_fit(keys, change):
    validate_model(config_with(**keys), SHAPE | change)


class Hub:
    """A hub on this machine: `answers` maps a path to (status, body, seconds to wait)."""

    def __init__(self, monkeypatch):
        self.answers: dict[str, tuple[int, bytes, float]] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                status, body, wait_s = hub.answers.get(self.path, (404, b"", 0.0))
                time.sleep(wait_s)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that hung up
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{self.server.server_port}"
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def answer(self, model: str, status: int, body: bytes = b"", wait_s: float = 0.0) -> None:
        self.answers[f"/{model}/resolve/main/config.json"] = (status, body, wait_s)


@pytest.fixture
def hub(monkeypatch):
    server = Hub(monkeypatch)
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def models_dir(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "someone--kept.json").write_text(json.dumps(SHAPE))
    return tmp_path / "models"


def test_a_local_folder_is_read_first(tmp_path, models_dir):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"vocab_size": 7}))
    shape, source = find_model_shape(str(tmp_path), models_dir)
    assert shape["vocab_size"] == 7 and source == str(tmp_path / "config.json")


def test_the_hub_is_asked_before_the_shape_file(hub, models_dir):
    hub.answer("someone/kept", 200, json.dumps(SHAPE | {"vocab_size": 9}).encode())
    shape, source = find_model_shape("someone/kept", models_dir)
    assert shape["vocab_size"] == 9 and source.endswith("/someone/kept/resolve/main/config.json")


@pytest.mark.parametrize(
    ("status", "body", "wait_s", "says"),
    [
        (401, b"", 0.0, "hf auth login"),
        (404, b"", 0.0, "404"),
        (200, b"<html>", 0.0, "did not answer"),
        (200, b"[]", 0.0, "no JSON object"),
        (200, b"{}", 3.0, "did not answer"),
    ],
)
def test_the_shape_file_stands_in_and_says_so(hub, models_dir, status, body, wait_s, says):
    hub.answer("someone/kept", status, body, wait_s)
    start = time.monotonic()
    shape, source = find_model_shape("someone/kept", models_dir, timeout_s=1.0)
    assert time.monotonic() - start < 2.5
    assert shape == SHAPE
    assert says in source and str(models_dir / "someone--kept.json") in source


def test_a_model_that_is_nowhere(hub, models_dir, tmp_path):
    for name in ("someone/unknown", "unknown", "some/where/else", str(tmp_path / "none")):
        with pytest.raises(ConfigError, match="expected a folder") as caught:
            find_model_shape(name, models_dir)
        assert f"policy.model_name={name}" in str(caught.value)


def test_a_folder_without_a_good_config_json(tmp_path, models_dir):
    with pytest.raises(ConfigError, match="cannot be read"):
        find_model_shape(str(tmp_path), models_dir)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json"):
            find_model_shape(str(tmp_path), models_dir)
