"""G4, part three: configurations that are known to be wrong, and what must be said about them."""

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from reinforcer_tp.config import Config, ConfigError, load_config
from reinforcer_tp.config_keys import all_keys, field_type, is_text

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs").glob("*.yaml"))
KEYS = all_keys(Config)
LEAVES = [key for key in KEYS if not any(other.startswith(f"{key}.") for other in KEYS)]
MINIMAL = ("policy.model_name=embedded", "data.dataset_name=embedded")
FREE = ("policy.tokenizer.chat_template_kwargs", "dpo.preference_loss")  # any mapping, any list


class Broken(NamedTuple):
    """A file's content (None = no file), overrides, and what the error must name."""

    content: bytes | None
    overrides: list[str]
    says: tuple[str, ...]


def _override(key: str, value: str, *says: str) -> Broken:
    return Broken(None, [f"{key}={value}"], says or (key,))


def _typo(random_: random.Random) -> Broken:
    key = random_.choice(LEAVES)
    place = random_.randrange(len(key.rpartition(".")[0]) + 1, len(key))
    wrong = (
        key[:place] + random_.choice(("", "zz", "\u0430", "\u200b", "-", "_")) + key[place + 1 :]
    )
    if wrong in KEYS or wrong.endswith("."):
        return _typo(random_)
    return _override(wrong, "1", "unknown key", wrong if wrong.isprintable() else "\\u200b")


# By the type of a field: texts that are no value of it.
_NO_VALUES = {
    int: ("abc", "1.5", "[1]", "{a: 1}", "true", "nan", ".inf", "1e2", "0x10", "1:30", "${x.y}"),
    float: ("abc", "[1.0]", "{a: 1}", "true", ".nan", ".inf", "-.inf", "1e999", "1e", "1,5", "-1"),
    bool: ("maybe", "2", "0", "0.5", "[true]", "{}", "nan"),
    list[str]: ("text", "{a: 1}", "7", "[[a]]", "[{a: 1}]", "true"),
    list[float]: ("text", "{a: 1}", "7", "[[1]]", "[a]", "[nan]", "[-1]", "[1, 2, 3, 4, 5]"),
    str: ("${oc.env:HOME}", "${", "${dpo.sed}", "???", "${oc.decode:'1'}", "a${b"),
}


def _wrong_type(random_: random.Random) -> Broken:
    key = random_.choice([key for key in LEAVES if key not in FREE])
    hint = field_type(Config, key)
    for kind, values in _NO_VALUES.items():
        if kind == hint or kind in getattr(hint, "__args__", ()):
            return _override(key, random_.choice(values))
    return _override(key, random_.choice(("zzz", "[a]", "7", "{a: 1}", "")), key)


def _not_text(random_: random.Random) -> Broken:
    """In a file a number is no text."""
    key = random_.choice([key for key in LEAVES if is_text(field_type(Config, key))])
    value = random_.choice(("8", "1e-5", "true", "[a]", "{a: 1}", "0.5"))
    return Broken(_nested(key, value), [], (key,))


def _nested(key: str, value: str) -> bytes:
    *sections, last = key.split(".")
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(sections)]
    lines.append(f"{'  ' * len(sections)}{last}: {value}")
    model = [] if key.startswith("policy.") else ["policy: {model_name: embedded}"]
    return "\n".join([*model, *lines, ""]).encode()


def _places(lines: list[str]) -> list[int]:
    """Lines that give a key a value."""
    found = ((i, line.strip()) for i, line in enumerate(lines))
    return [i for i, line in found if ": " in line and not line.startswith("#")]


def _twice(random_: random.Random) -> Broken:
    """One line of one of the project's files stands there twice."""
    lines = random_.choice(FILES).read_text().splitlines()
    places = [
        i for i, line in enumerate(lines) if ": " in line and not line.lstrip().startswith("#")
    ]
    place = random_.choice(places)
    name = lines[place].partition(":")[0].strip()
    text = "\n".join([*lines[: place + 1], lines[place], *lines[place + 1 :]])
    return Broken(text.encode(), [], (f"line {place + 2}", "duplicate key", name))


def _cut(random_: random.Random) -> Broken:
    """One of the project's files with one of its lines spoiled."""
    lines = random_.choice(FILES).read_text().splitlines()
    places = [
        i for i, line in enumerate(lines) if ": " in line and not line.lstrip().startswith("#")
    ]
    place = random_.choice(places)
    spoiled = random_.choice(
        ("{0}: {{", "{0}: [a", "{0}: 'a", '{0}: "\\q"', "{0}: *none", "\t{0}: 1")
    )
    lines[place] = spoiled.format(lines[place].partition(":")[0])
    return Broken("\n".join(lines).encode(), [], ("broken.yaml",))


_TAGGED = (
    *("!!python/object/apply:os.system [id]", "!!python/name:os.system", "!!int abc", "!!float x"),
    *("!!timestamp z", "!!bool maybe", "!!binary '%'", "!!set {a}", "!own x", "!!omap [a]"),
    *("!!map 1", "!!python/object/new:os.system [id]", "!<tag:evil> 1", "!!seq a"),
    *("!!pairs [[a]]", "!!value x"),
)  # fmt: skip


def _tag(random_: random.Random) -> Broken:
    key = random_.choice([key for key in LEAVES if not is_text(field_type(Config, key))])
    return Broken(_nested(key, random_.choice(_TAGGED)), [], ("broken.yaml",))


_BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
_CONTENTS = (
    *(b"", b"\n# nothing\n", b"- dpo\n", b"text", b"7", b"null", b"[]", b"dpo:\n", b"dpo: 7\n"),
    *(b"\x00" * 64, bytes(range(256)), b"\xff\xfedpo", "dpo: {}".encode("utf-16")),
    *(b"\x7fELF\x02\x01", b"a: 1\n---\nb: 2\n", b"dpo: {seed: 1", b"dpo:\n\tseed: 1\n"),
    *(b"dpo: {? [a] : 1}", b"{}: 1", b"dpo: &a\n  seed: *a\n", b"dpo: *b\n", b"<<: 7\n"),
    *(b"<<: [1]\n", _BOMB.encode(), b"? a\n? a\n", b"dpo: " + b"[" * 5000 + b"]" * 5000),
    *(b"dpo: " + b"{a: " * 3000, b"- " * 3000 + b"a", b'dpo: {seed: "\\UFFFFFFFF"}'),
    *(b'"\\ud800": 1', b'"a\\nb": 1', b"dpo: {seed: " + b"9" * 5000 + b"}"),
    *(b'data: {prompt_key: "\\uDC80"}', b'"dpo\\e[31m": {seed: 1}', b"1: 2", b"true: 1"),
    *(b"null: {}", b"dpo: {seed: 1.}", b"dpo: {seed: 0o17}", b"DPO: {seed: 1}", b"dpo.seed: 1"),
    *(b"policy: []", "d\u03c1o: {seed: 1}".encode(), "dpo: {s\u200beed: 1}".encode()),
    *(b"%YAML 9.9\n---\na: 1", b"policy: {tokenizer: {chat_template_kwargs: {7: 1}}}"),
    *(b"dpo: {seed: 0x7f}", b"a" * 3_000_000),
    *(b"policy: {tokenizer: {chat_template_kwargs: {a: '${oc.env:HOME}'}}}", b"PK\x03\x04"),
    *(b"<a/>", b"policy: {tokenizer: {chat_template_kwargs: {a: '???'}}}", b"{", b"]", b"'"),
    *(b"&a", b"*a", b"!!"),
)  # fmt: skip


def _content(random_: random.Random) -> Broken:
    return Broken(random_.choice(_CONTENTS), [], ())


_OVERRIDES = (
    *("", "=", "=1", "dpo", "dpo.seed", "dpo.seed=", "+dpo.seed=1", "~dpo.seed", "++a=1", "-x=1"),
    *("dpo..seed=1", ".dpo.seed=1", "dpo.=1", ".=1", "..=1", "dpo.seed.x.y=1", "dpo=1", "dpo=[1]"),
    *("dpo.seed=${dpo.seed}", "dpo.seed=${dpo.max_num_steps", "dpo.seed={", "dpo.seed=*a"),
    *("dpo.seed=!!int x", "dpo.seed=\x00", "dpo.seed=\udcff", "dpo.s\udcffeed=1", "d\npo.seed=1"),
    *("dpo.seed=1\n2", "\x1b[2J=1", "dpo.seed=" + "9" * 5000, "dpo.seed=" + "[" * 5000),
    *("x" * 5000 + "=1", "dpo.seed=\u0663x", "DPO.seed=1", "data.prompt_key=\udcff"),
    *("logger.log_dir=a\x00b", "dpo.seed=\U0001f600", "policy.model_name=' '"),
    *("logger.log_dir=' '", "checkpointing.resume=' '", "cluster.hang_timeout_s=0"),
    *("dpo.seed=4294967296", "policy.megatron_cfg.optimizer.lr=-1e-5"),
    *("policy.megatron_cfg.optimizer.lr=1e-5x", "dpo.ld_alpha=2"),
    *("policy.megatron_cfg.optimizer.adam_beta2=1.0", "policy.megatron_cfg.optimizer.adam_eps=0"),
    *("dpo.label_smoothing=0.5", "dpo.label_smoothing=-0.1"),
    *("dpo.reference_policy_kl_penalty=-0.1", "policy.train_global_batch_size=0"),
    *("policy.max_total_sequence_length=1", "data.num_workers=0", "policy.micro_batch_tokens=2"),
    *("checkpointing.save_period=0", "checkpointing.keep_top_k=-1"),
    *("checkpointing.checkpoint_must_save_by=3h", "checkpointing.checkpoint_must_save_by=1:2:3:4"),
    *("dpo.preference_loss=[]", "dpo.preference_loss=[sigmoid,sigmoid]", "dpo.preference_loss=7"),
    *("dpo.preference_loss={a: 1}", "policy.megatron_cfg.tensor_model_parallel_size=2"),
    *("cluster.num_nodes=2", "data.dataset_name=auto"),
    *("policy.megatron_cfg.scheduler.lr_warmup_iters=-1", "dpo.loss_weights=[1,2]"),
    "data.ties=maybe",
)  # fmt: skip


def _bad_override(random_: random.Random) -> Broken:
    return Broken(None, [random_.choice(_OVERRIDES)], ())


MUTATIONS: tuple[Callable[[random.Random], Broken], ...] = (
    *(_typo, _typo, _wrong_type, _wrong_type, _wrong_type, _not_text, _twice, _cut, _tag, _content),
    *(_content, _bad_override, _bad_override),
)
# What must be accepted, and the value it must have.
SOUND = {
    "policy.megatron_cfg.optimizer.lr=1e-5": 1e-5,
    "policy.megatron_cfg.optimizer.lr=1E-5": 1e-5,
    "policy.megatron_cfg.optimizer.lr=1.e-5": 1e-5,
    "policy.megatron_cfg.optimizer.lr=.1e-4": 1e-5,
    "policy.megatron_cfg.optimizer.lr=0": 0.0,
    "dpo.seed=0042": 42,  # not 34
    "logger.wandb.name=1e-5": "1e-5",
    "logger.wandb.name=no": "no",
    "data.prompt_key=12:30:45": "12:30:45",
}


def check_configs(count: int, seed: int, folder: Path) -> tuple[Counter, list[str]]:
    """Counts and failures of `count` broken configurations."""
    counts, failures = Counter(), []
    path = folder / "broken.yaml"
    random_ = random.Random(seed)
    cases = [Broken(content, [], ()) for content in _CONTENTS]
    cases += [Broken(None, [text], ()) for text in _OVERRIDES]
    random_.shuffle(cases)
    cases = cases[: count // 3]
    cases += [random_.choice(MUTATIONS)(random_) for _ in range(count - len(cases))]
    for case in cases:
        wrong = wrong_message(case, path)
        if wrong:
            failures.append(f"config {case.overrides or (case.content or b'')[:80]}: {wrong}"[:400])
    counts["configs"] = len(cases)
    for text, expected in SOUND.items():
        wrong = _wrong_value(text, expected)
        failures += [f"config {text}: {wrong}"] if wrong else []
    return counts, failures


def _load(case: Broken, path: Path) -> None:
    if case.content is None:
        config = load_config(None, [*MINIMAL, *case.overrides])
    else:
        path.write_bytes(case.content)
        config = load_config(str(path), case.overrides)
    config.validate(1, 1)


def wrong_message(case: Broken, path: Path) -> str:
    """What is wrong with how a broken configuration is refused."""
    try:
        _load(case, path)
    except ConfigError as error:
        text = str(error)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]!r}"
    else:
        return "is accepted"
    missing = [part for part in case.says if part not in text]
    if missing:
        return f"{missing[0]!r} is not in {text[:300]!r}"
    if not text.isprintable() or not 15 < len(text) < 1500:
        return f"no clear line ({len(text)} characters): {text[:200]!r}"
    return ""


def _wrong_value(text: str, expected: object) -> str:
    try:
        value = load_config(None, [*MINIMAL, text])
    except ConfigError as error:
        return "" if expected is None else str(error)
    for part in text.partition("=")[0].split("."):
        value = getattr(value, part)
    if expected is None or (value, type(value)) != (expected, type(expected)):
        return f"gives {value!r}, expected {expected!r}"
    return ""


def check_exit_codes(every: int, folder: Path) -> tuple[Counter, list[str]]:
    """Real starts: code 78, one line, no traceback, before torch is imported."""
    counts, failures = Counter(), []
    wrong = [text for text in _OVERRIDES if "\x00" not in text and text][:: 5 * every]
    for text in wrong:
        command = [sys.executable, str(ROOT / "reinforcer_tp" / "train.py"), "--", text]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [os.fsencode(part) for part in command],
            capture_output=True, env=environment, timeout=120, cwd=folder, check=False,
        )  # fmt: skip
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        if done.returncode != 78 or len(lines) != 1 or "error" not in lines[0]:
            failures.append(f"start with {text[:80]!r}: code {done.returncode}, {lines[-3:]}")
        counts["starts_with_code_78"] += done.returncode == 78
    return counts, failures
