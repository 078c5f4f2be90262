"""benchmarks.answers: what a model says, greedy, by its chat template, until its turn ends."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import answers
from reinforcer_tp.embedded import ensure_embedded

PROMPTS = ["Write about the river.", "Hello"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """The embedded model with two sets of random weights."""
    made = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("models") / f"seed-{seed}"
        shutil.copytree(ensure_embedded().model, folder)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for parameter in model.parameters():  # decided enough that no rounding decides
            parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        made.append(folder)
    return made


def greedy(folder: Path, prompt: str, num_tokens: int) -> str:
    """Token after token, without a cache."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    prompt_ids = ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    for _ in range(num_tokens):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    answer = ids[0, prompt_ids.shape[1] :]
    cut = "" if answer[-1] == tokenizer.eos_token_id else " ..."
    return tokenizer.decode(answer, skip_special_tokens=True).strip() + cut


def test_each_prompt_gets_the_greedy_answer_of_each_folder(folders, capsys):
    arguments = [str(folder) for folder in folders]
    for prompt in PROMPTS:
        arguments += ["--prompt", prompt]
    assert answers.main([*arguments, "--max-new-tokens", "12"]) == 0
    expected, seen = "", set()
    for prompt in PROMPTS:
        expected += f"prompt: {prompt}\n"
        for folder in folders:
            seen.add(text := greedy(folder, prompt, 12))
            lines = "\n".join(f"    {line}" for line in text.splitlines())
            expected += f"  {folder}:\n{lines}\n"
    assert capsys.readouterr().out == expected
    assert len(seen) == 4


def test_an_answer_ends_with_the_turn(folders, tmp_path):
    """All logits are zero, and the first token is said: the end of a turn in one of two folders."""
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    for eos_token_id, expected in ((0, ""), (5, " ...")):
        folder = tmp_path / str(eos_token_id)
        shutil.copytree(folders[0], folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.model.norm.weight.data.zero_()
        model.save_pretrained(folder)
        for name, value in (
            ("config.json", eos_token_id),
            ("generation_config.json", eos_token_id),
            ("tokenizer_config.json", tokenizer.convert_ids_to_tokens(eos_token_id)),
        ):
            content = json.loads((folder / name).read_text())
            content["eos_token_id" if isinstance(value, int) else "eos_token"] = value
            (folder / name).write_text(json.dumps(content))
        assert answers.answer(folder, ["Hello"], 4) == [expected]


def test_what_is_no_chat_model_is_refused(folders, tmp_path, capsys):
    assert answers.main([str(tmp_path / "none"), "--prompt", "Hello"]) == 1
    assert "is no folder; expected one with a model" in capsys.readouterr().err
    asks = tmp_path / "asks"
    shutil.copytree(folders[0], asks)
    config = json.loads((asks / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.Model"}
    (asks / "config.json").write_text(json.dumps(config))
    assert answers.main([str(asks), "--prompt", "Hello"]) == 1
    assert "asks for code" in capsys.readouterr().err
    bare = tmp_path / "bare"
    shutil.copytree(folders[0], bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    assert answers.main([str(bare), "--prompt", "Hello"]) == 1
    assert "has no chat template" in capsys.readouterr().err
