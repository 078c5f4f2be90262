"""The tokenizer of a folder or a hub id: loading, what rows need of it, what identifies it."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from reinforcer_tp.data.hub import hub_problem, looks_like_path, one_line


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
    problem = None if folder.is_dir() else hub_problem(name, "model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else name,
            trust_remote_code=False,
            local_files_only=problem is not None,
        )
    except Exception as error:  # the edge to files and network that others wrote
        raise ValueError(
            f"the tokenizer {name} cannot be loaded: {problem or one_line(error)}; check "
            "policy.model_name and policy.tokenizer.name"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
    return tokenizer


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
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content |= {"truncation": None, "padding": None}  # state of the last call
    else:
        content = {"vocab": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
        content["settings"] = {key: repr(value) for key, value in tokenizer.init_kwargs.items()}
    names = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    described = [content, names, tokenizer.all_special_ids, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
