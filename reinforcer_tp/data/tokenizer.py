"""The tokenizer of a folder or a hub id: loading, what rows need of it, what identifies it."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from reinforcer_tp.data.hub import hub_problem, looks_like_path, one_line
from reinforcer_tp.data.templates import TEMPLATE_CHARACTERS, check_template
from reinforcer_tp.untrusted import INDEX_BYTES, inside, read_json, refuse_code

_FILES = ["*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken"]  # that a tokenizer is made of
_SETTINGS = ("config.json", "tokenizer_config.json", "special_tokens_map.json")
_LARGE = {"tokenizer.json": 1 << 29, "chat_template.jinja": 4 * TEMPLATE_CHARACTERS}  # bytes


def load_tokenizer(name: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or a hub id, without code from either.

    `chat_template`: Jinja text, or the path of a .jinja file; None keeps the tokenizer's own.
    ValueError in one line where there is no such tokenizer or template.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() and (looks_like_path(name) or folder.exists()):
        raise ValueError(
            f"the tokenizer {name} is no folder; expected one with tokenizer files, or a hub id"
        )
    try:
        folder = folder if folder.is_dir() else _hub_folder(name)
        check_tokenizer_folder(folder)
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
        check_template(tokenizer)
    except Exception as error:  # the edge to files and network that others wrote
        raise ValueError(
            f"the tokenizer {name} cannot be loaded: {one_line(error)}; check "
            "policy.model_name and policy.tokenizer.name"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
        check_template(tokenizer)
    return tokenizer


def _hub_folder(name: str) -> Path:
    """The hub's files of a tokenizer in its cache. Raises ValueError where neither has them."""
    problem = hub_problem(name, "model")
    try:
        return Path(
            snapshot_download(name, allow_patterns=_FILES, local_files_only=problem is not None)
        )
    except Exception as error:  # the network's edge
        raise ValueError(problem or one_line(error)) from error


def check_tokenizer_folder(folder: Path) -> None:
    """Raises ValueError for files that lead elsewhere, ask for code, or are no JSON."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() or not any(path.match(pattern) for pattern in _FILES):
            continue
        inside(folder, path.name)
        limit = _LARGE.get(path.name, INDEX_BYTES)
        if path.stat().st_size > limit:
            raise ValueError(f"{path} is larger than {limit:,} bytes")
        if path.name in _SETTINGS:
            # transformers writes a model_max_length of 1e30, all digits, where there is none
            content = read_json(path, INDEX_BYTES, integer_bits=128)
            refuse_code(content, path)
            _check_settings(content, path)


def _check_settings(content: dict[str, Any], path: Path) -> None:
    kind = content.get("tokenizer_class")
    if kind is not None and not _is_tokenizer_class(kind):
        raise ValueError(
            f"{path} has tokenizer_class={str(kind)[:80]!r}, which is no tokenizer of "
            "transformers; code of others is not run"
        )
    if content.get("init_inputs"):
        raise ValueError(f"{path} has init_inputs; expected none")
    for name in content.get("fast_tokenizer_files") or ():
        inside(path.parent, name)


def _is_tokenizer_class(name: object) -> bool:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Z]\w*", name, re.ASCII):
        return False
    if not name.endswith(("Tokenizer", "TokenizerFast", "Backend")):
        return False  # AutoModel, say, would load the weights
    found = tokenizer_class_from_name(name)
    return isinstance(found, type) and found.__module__.startswith("transformers.")


def read_chat_template(value: str) -> str:
    """Jinja text as it is, or the text of a .jinja file."""
    if "{" in value:
        return value
    path = Path(value).expanduser()
    if path.suffix != ".jinja" or not path.is_file():
        raise ValueError(
            f"policy.tokenizer.chat_template={value}: expected Jinja text or the path of a .jinja "
            "file"
        )
    if path.stat().st_size > 4 * TEMPLATE_CHARACTERS:
        raise ValueError(f"policy.tokenizer.chat_template={value}: the file is no template's size")
    return path.read_text(encoding="utf-8")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, kinds: Iterable[bool]) -> None:
    """ValueError where the tokenizer lacks what the rows need; `kinds`: is_chat of the rows."""
    kinds = set(kinds)
    if True in kinds and not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template, but there are rows of "
            "messages; set policy.tokenizer.chat_template to Jinja text or a .jinja file"
        )
    if False in kinds and tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has no EOS token, but there are rows of raw "
            "text, which must end with one; set eos_token in its tokenizer_config.json"
        )


def text_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that the tokenizer itself puts in front of raw text."""
    probe = "a"
    ids = tokenizer(probe)["input_ids"]
    bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
    starts = (i for i in range(len(ids)) if ids[i : i + len(bare)] == bare)
    return ids[: next(starts)]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash that changes whenever the tokenizer or its template may give other ids."""
    return _hash(*_vocabulary(tokenizer), json.dumps(tokenizer.chat_template, sort_keys=True))


def tokenizer_digests(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The same in two parts, by name."""
    return {
        "tokenizer": _hash(*_vocabulary(tokenizer)),
        "chat_template": hashlib.sha256(
            json.dumps(tokenizer.chat_template, sort_keys=True).encode()
        ).hexdigest(),
    }


def _hash(*described: str) -> str:
    """Of a list of values, each as JSON."""
    return hashlib.sha256(f"[{', '.join(described)}]".encode()).hexdigest()


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Values as JSON."""
    if tokenizer.is_fast:
        content = _without_state(tokenizer.backend_tokenizer.to_str())
    else:
        described = {"vocab": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
        settings = tokenizer.init_kwargs.items()
        described["settings"] = {k: repr(value) for k, value in settings if k != "chat_template"}
        content = json.dumps(described, sort_keys=True)
    names = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return [content, json.dumps(names, sort_keys=True), json.dumps(tokenizer.all_special_ids)]


@functools.lru_cache(maxsize=2)  # a start asks several times, and this is most of what it takes
def _without_state(text: str) -> str:
    """A tokenizer's JSON without what its last call left."""
    return json.dumps(json.loads(text) | {"truncation": None, "padding": None}, sort_keys=True)
