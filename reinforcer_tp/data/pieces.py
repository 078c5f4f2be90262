"""Ids of texts that repeat each other: what stands between special tokens is tokenized once.

A fast tokenizer cuts a text at its special tokens before it does anything else, and tokenizes what
stands between two of them for itself. So the three texts of a pair, which spell the same prompt
three times, need each piece once. Where something of a tokenizer looks over such a border (a token
that takes the blanks beside it, the blank that some put before a text's first word) texts are
tokenized whole: the ids are the same either way.
"""

import json
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase

_LOCAL = {  # pre-tokenizers that look at one piece alone; Metaspace: _is_local
    *("BertPreTokenizer", "ByteLevel", "Digits", "Punctuation", "Split", "Whitespace"),
    *("WhitespaceSplit", "UnicodeScripts"),
}


class PieceTokenizer:
    """`tokenizer(texts, add_special_tokens=False)["input_ids"]`, sooner."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._ids = _border_ids(tokenizer)
        names = sorted(self._ids, key=len, reverse=True)  # the longest wins, as in the tokenizer
        self._borders = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without the tokenizer's own start and end."""
        if not texts:
            return []
        if self._borders is None or not self._is_plain():
            found = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
            return found["input_ids"]
        cut = [self._borders.split(text) for text in texts]
        pieces = list(dict.fromkeys(chain.from_iterable(parts[::2] for parts in cut)))
        encoded = self.tokenizer.backend_tokenizer.encode_batch_fast(
            pieces, add_special_tokens=False
        )
        ids = {piece: found.ids for piece, found in zip(pieces, encoded, strict=True)}
        ids |= {"": []}
        ids |= {name: [number] for name, number in self._ids.items()}
        return [list(chain.from_iterable(map(ids.__getitem__, parts))) for parts in cut]

    def _is_plain(self) -> bool:
        """Whether nothing was left in the tokenizer by a call with other settings."""
        backend = self.tokenizer.backend_tokenizer
        left = (backend.truncation, backend.padding, self.tokenizer.split_special_tokens or None)
        return left == (None, None, None) and not backend.encode_special_tokens


def _border_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Special tokens that every text is cut at -> their ids; none where it must stay whole."""
    if not tokenizer.is_fast or not _is_local(_state(tokenizer.backend_tokenizer.pre_tokenizer)):
        return {}
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    cutting = [token for token in added if not token.normalized]
    if any(t.lstrip or t.rstrip or t.single_word or not t.content for t in cutting):
        return {}
    return {t.content: tokenizer.backend_tokenizer.token_to_id(t.content) for t in cutting}


def _state(part: Any) -> Any:
    """What a part of a tokenizer is made of; False where that is code of somebody's."""
    try:
        return None if part is None else json.loads(part.__getstate__())
    except Exception:  # the edge to the library: its type for this is its own
        return False


def _is_local(state: Any) -> bool:
    if state is None:
        return True
    if not isinstance(state, dict):
        return False
    if state["type"] == "Sequence":
        return all(map(_is_local, state["pretokenizers"]))
    if state["type"] == "Metaspace":
        return state.get("prepend_scheme") in ("always", "never")
    return state["type"] in _LOCAL
