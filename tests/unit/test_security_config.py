"""Configurations that are attacks, or that hold secrets, are refused: fast, in one line."""

import time
from pathlib import Path

import pytest

from reinforcer_tp.config import ConfigError, load_config

DEFAULT = Path(__file__).resolve().parents[2] / "configs" / "dpo.yaml"
DEEP = "[" * 1_000_000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "python/object": ("dpo: !!python/object/apply:os.system ['touch ran']", "tags are not allowed"),
    "python/name": ("dpo:\n  seed: !!python/name:os.system", "tags are not allowed"),
    "harmless tag": ("dpo:\n  seed: !!int '3'", "tags are not allowed"),
    "own tag": ("dpo: !env HF_TOKEN", "tags are not allowed"),
    "merge of a tag": ("x: &x !!map {seed: 1}\ndpo:\n  <<: *x", "tags are not allowed"),
    "alias bomb": (BOMB, "more than 10,000 values"),
    "chain of aliases": (
        "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000)),
        "recursion|more than 10,000 values",
    ),
    "deep list": (f"dpo: {DEEP}", "more than 32 levels"),
    "deep mapping": ("\n".join("  " * i + "a:" for i in range(500)), "more than 32 levels"),
    "huge": ("#" * (1 << 20) + "\ndpo: {}", "more than 1,048,576 characters"),
    "huge number": (f"dpo:\n  seed: {'1' * 5000}", "4300 digits"),
    "zero byte": ("dpo: \0", "special characters"),
    "_target_": ("_target_: os.system\ncommand: ls", "unknown key _target_"),
    "nested _target_": ("dpo:\n  _target_: os.system", r"unknown key dpo\._target_"),
    "__class__": ("dpo:\n  __class__: {__init__: 1}", r"unknown key dpo\.__class__"),
    "environment": ("logger:\n  log_dir: ${oc.env:HOME}", "no resolvers"),
    "decoder": ("logger:\n  log_dir: '${oc.decode:${oc.env:HOME}}'", "no resolvers"),
    "url": ("policy:\n  model_name: https://me:hunter2hunter2@hub/x", "holds a credential"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, says = HOSTILE[name]
    (tmp_path / "run.yaml").write_text(text)
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=says) as caught:
        load_config("run.yaml", [])
    assert time.monotonic() - begin < 5  # seldom over 0.5 on an idle machine
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert "hunter2" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("logger.log_dir=${oc.env:HOME}", "no resolvers"),
        ("policy.tokenizer.chat_template_kwargs={a: '${oc.env:HOME}'}", "no resolvers"),
        ("dpo.seed=!!python/object/apply:os.system [ls]", "tags are not allowed"),
        ("dpo._target_=os.system", r"unknown key dpo\._target_"),
        (f"dpo.seed={DEEP}", "more than 32 levels"),
        (f"dpo.seed={'1' * 5000}", "4300 digits"),
        ("logger.mlflow.tracking_uri=https://me:hunter2hunter2@host/", "holds a credential"),
        ("logger.wandb.entity=hf_abcdefghijklmnopqrstuvwxyz", "holds a credential"),
        ("policy.tokenizer.chat_template_kwargs={a: {b: [0, canary-of-42]}}", "holds a credential"),
        ("policy.tokenizer.chat_template_kwargs={canary-of-42: 1}", "holds a credential"),
        ("dpo.canary-of-42=1", "holds a credential"),
        ("logger.log_dir=runs/" + "x" * 60 + "/canary-of-42", "holds a credential"),
    ],
)
def test_a_hostile_override(override, says, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "canary-of-42")
    with pytest.raises(ConfigError, match=says) as caught:
        load_config(None, [override])
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    assert not any(part in message for part in ("hunter2", "canary", "hf_abc"))


@pytest.mark.parametrize("other", ["dpo.seed", "dpo.max_num_epochs"])
def test_references_in_a_circle(other):
    overrides = [f"dpo.seed=${{{other}}}", "dpo.max_num_epochs=${dpo.seed}"]
    with pytest.raises(ConfigError, match=r"dpo\."):
        load_config(str(DEFAULT), overrides)


def test_aliases_and_merges_of_usual_size_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    kwargs = "    chat_template_kwargs: {a: &a {b: 1}, c: *a, d: {<<: *a, e: 2}}\n"
    path.write_text(DEFAULT.read_text().replace("    chat_template_kwargs: null\n", kwargs))
    read = load_config(str(path), []).policy.tokenizer.chat_template_kwargs
    assert read == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}
