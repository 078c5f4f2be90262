"""The embedded demo files: the same everywhere, loadable, and won only by reading the prompt."""

import hashlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from reinforcer_tp import embedded
from reinforcer_tp.config import ConfigError

_BETA = 0.1


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return embedded.ensure_embedded(str(tmp_path_factory.mktemp("embedded")))


@pytest.fixture(scope="module")
def tokenizer(paths):
    return AutoTokenizer.from_pretrained(paths.model)


def read_rows(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_content_is_pinned(paths):
    """A change of these bytes changes every demo number that someone wrote down."""
    model = json.loads(Path(paths.model, "tokenizer.json").read_text())["model"]
    pieces = json.dumps([model["vocab"], model["merges"]], sort_keys=True)
    digests = {
        "train": digest(Path(paths.train).read_bytes()),
        "validation": digest(Path(paths.validation).read_bytes()),
        "weights": digest(Path(paths.model, "model.safetensors").read_bytes()),
        "pieces": digest(pieces.encode()),
    }
    assert digests == {
        "train": "72a375bac2819b40",
        "validation": "e7c68f4a6732cac2",
        "weights": "5a261aefcf34ff57",
        "pieces": "105e6f49f8de3d18",
    }


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def test_simultaneous_processes_agree(paths, tmp_path):
    """Different hash seeds and thread counts, one cache folder: one set of the same bytes."""
    code = "from reinforcer_tp.embedded import ensure_embedded; print(ensure_embedded().model)"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ
            | {
                "REINFORCER_TP_CACHE": str(tmp_path),
                "PYTHONHASHSEED": str(seed),
                "RAYON_NUM_THREADS": str(seed),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2, 3)
    ]
    outputs = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    (folder,) = tmp_path.iterdir()  # no temporary folder is left
    assert outputs == {str(folder / "model")}
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (folder / "model" / name).read_bytes() == Path(paths.model, name).read_bytes()


def test_existing_files_are_kept(paths):
    before = Path(paths.train).stat().st_mtime_ns
    again = embedded.ensure_embedded(str(Path(paths.train).parents[1]))
    assert again == paths
    assert Path(paths.train).stat().st_mtime_ns == before


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("REINFORCER_TP_CACHE", raising=False)
    assert embedded.default_cache_root() == tmp_path / "reinforcer_tp"
    monkeypatch.setenv("REINFORCER_TP_CACHE", str(tmp_path / "own"))
    assert embedded.default_cache_root() == tmp_path / "own"


def test_bad_folders(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="set REINFORCER_TP_CACHE to a writable folder"):
        embedded.ensure_embedded(str(tmp_path / "file"))
    Path(embedded.ensure_embedded(str(tmp_path)).model, "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has lost \['model/config.json'\]; delete it"):
        embedded.ensure_embedded(str(tmp_path))


def test_answers_are_balanced(paths, tokenizer):
    """Chosen and rejected are the same multiset of texts, so of lengths in any unit."""
    for path, num_nouns in ((paths.train, 40), (paths.validation, 8)):
        rows = read_rows(path)
        assert len(rows) == 24 * num_nouns
        for end in (2, 32, 64, len(rows)):  # also where a validation stops early
            chosen = Counter(row["chosen"] for row in rows[:end])
            assert chosen == Counter(row["rejected"] for row in rows[:end])
        assert all(len(row["chosen"]) == len(row["rejected"]) for row in rows)
        assert all(row["chosen"] != row["rejected"] for row in rows)
        lengths = [
            Counter(len(tokenizer(row[side])["input_ids"]) for row in rows)
            for side in ("chosen", "rejected")
        ]
        assert lengths[0] == lengths[1]


def test_validation_prompts_are_held_out(paths):
    train, validation = read_rows(paths.train), read_rows(paths.validation)
    prompts = [row["prompt"] for row in train + validation]
    assert len(set(prompts)) == len(prompts)
    words = {word for row in train for text in row.values() for word in text.split()}
    for noun in embedded.HELD_OUT_NOUNS:
        assert noun not in words
        assert any(noun in row["prompt"] for row in validation)


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_tokenizer_round_trips_any_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    with_bos = tokenizer(text)["input_ids"]
    assert with_bos == [tokenizer.bos_token_id, *ids]
    if not any(t.content in text for t in tokenizer.added_tokens_decoder.values()):
        assert tokenizer.decode(with_bos, skip_special_tokens=True) == text


def test_tokenizer_edge_texts(tokenizer):
    for text in (
        "",
        " ",
        "\n\n  x ",
        "na\u00efve caf\u00e9",
        "\u4f60\u597d\uff0c\u4e16\u754c",
        "\U0001f642\u200d\U0001f525",
        "\x00\x7f",
        "don't  .",
    ):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert max(ids, default=0) < embedded.VOCAB_SIZE
    assert len(tokenizer) == embedded.VOCAB_SIZE
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (0, 1, 2)  # as config.json says


def test_prompts_end_at_a_token_border(paths, tokenizer):
    for row in read_rows(paths.validation):
        prompt = tokenizer(row["prompt"])["input_ids"]
        for side in ("chosen", "rejected"):
            assert tokenizer(row["prompt"] + row[side])["input_ids"][: len(prompt)] == prompt


def test_chat_template(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    prompt = (
        "<|bos|><|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt == tokenizer.apply_chat_template(
        messages[:2], tokenize=False, add_generation_prompt=True
    )
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == prompt + "Hello<|im_end|>\n"
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == 3
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_model_loads_whole(paths):
    model, info = AutoModelForCausalLM.from_pretrained(paths.model, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(model).__name__ == "LlamaForCausalLM"
    config = model.config
    assert config.rope_parameters["rope_type"] == "default"
    assert config.rope_parameters["rope_theta"] == 10000.0
    shape = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
    assert shape == (4, 4, 2)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    for matrix in matrices:
        assert matrix.dtype == torch.float32
        assert matrix.std().item() == pytest.approx(embedded.WEIGHT_STD, rel=0.02)
        assert abs(matrix.mean().item()) < 4 * embedded.WEIGHT_STD / math.sqrt(matrix.numel())
    assert len({matrix.sum().item() for matrix in matrices}) == len(matrices)


def encode(rows, tokenizer, with_prompt: bool):
    """(token ids, attention mask, response mask), each (2B, L): chosen at 2i, rejected at 2i+1."""
    pairs = []
    for row in rows:
        prompt = tokenizer(row["prompt"] if with_prompt else "")["input_ids"]
        for side in ("chosen", "rejected"):
            answer = tokenizer(row[side], add_special_tokens=False)["input_ids"]
            pairs.append((prompt, [*answer, tokenizer.eos_token_id]))
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids, attention, response = torch.zeros(3, len(pairs), length, dtype=torch.long)
    for i, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        attention[i, :end] = 1
        response[i, len(prompt) : end] = 1
    return ids, attention, response


def answer_logps(model, encoded, rows=slice(None)) -> torch.Tensor:  # (2B,)
    ids, attention, response = (part.view(-1, 2, part.shape[1])[rows] for part in encoded)
    ids, attention, response = (part.flatten(0, 1) for part in (ids, attention, response))
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (logps * response[:, 1:]).sum(1)


def margins(logps, reference):  # (2B,), (2B,) -> (B,)
    rewards = _BETA * (logps - reference).view(-1, 2)
    return rewards[:, 0] - rewards[:, 1]


def train_plain_dpo(paths, tokenizer, *, steps: int, with_prompt: bool = True):
    """(training losses, held-out accuracy) of DPO in plain torch with the demo's settings."""
    model = AutoModelForCausalLM.from_pretrained(paths.model)
    train = encode(read_rows(paths.train), tokenizer, with_prompt)
    held_out = encode(read_rows(paths.validation), tokenizer, with_prompt)
    with torch.no_grad():
        train_reference = answer_logps(model, train)
        held_out_reference = answer_logps(model, held_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    order = torch.randperm(len(train[0]) // 2, generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(steps):
        rows = order[torch.arange(32 * step, 32 * step + 32) % len(order)]
        reference = train_reference.view(-1, 2)[rows].flatten()
        loss = -F.logsigmoid(margins(answer_logps(model, train, rows), reference)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        won = margins(answer_logps(model, held_out), held_out_reference) > 0
    return losses, won.float().mean().item()


def test_dpo_without_the_prompt_learns_nothing(paths, tokenizer):
    _, accuracy = train_plain_dpo(paths, tokenizer, steps=15, with_prompt=False)
    assert 0.4 <= accuracy <= 0.6


def test_a_prompt_blind_scorer_learns_nothing(paths, tokenizer):
    """Logistic regression on which tokens an answer has: the best that an answer alone can tell."""

    def differences(path):  # (B, V): tokens of chosen minus tokens of rejected
        table = torch.zeros(len(read_rows(path)), embedded.VOCAB_SIZE)
        for i, row in enumerate(read_rows(path)):
            for side, sign in (("chosen", 1.0), ("rejected", -1.0)):
                ids = tokenizer(row[side])["input_ids"]
                table[i].index_add_(0, torch.tensor(ids), torch.full((len(ids),), sign))
        return table

    generator = torch.Generator().manual_seed(0)
    weight = (0.1 * torch.randn(embedded.VOCAB_SIZE, generator=generator)).requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=0.01)
    train, held_out = differences(paths.train), differences(paths.validation)
    for _ in range(200):
        optimizer.zero_grad()
        F.softplus(-(train @ weight)).mean().backward()
        optimizer.step()
    for table in (train, held_out):
        accuracy = (table @ weight > 0).float().mean().item()
        assert 0.4 <= accuracy <= 0.6
