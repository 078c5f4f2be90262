"""What a template or a tokenizer does to a row that its author may not expect: counted, not hidden.

control_text: a message spells a special token, which becomes that token
template_text: the template writes text between the prompt and the response, which is trained on
rewritten: the template changes a response's text
unknown_text: the tokenizer has no token for a part of the text
"""

import re
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from reinforcer_tp.data.pairs import PreferencePair
from reinforcer_tp.data.shapes import common_length

TEXTS = {  # what the report says after the number of rows
    "control_text": "a message spells a special token, which becomes the token",
    "template_text": "the template writes text between prompt and response; it is trained on",
    "rewritten": "the template changes the text of a response",
    "unknown_text": "the tokenizer has no token for a part of the text",
}
_LONGEST = 80  # characters of an example


class SpecialText:
    """The special tokens of a tokenizer as they would be spelled."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        names = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def is_all_of(self, text: str) -> bool:
        """Whether `text` is special tokens and blanks, and nothing else."""
        return not self._names.sub("", text).strip()

    def first_in(self, texts: Iterable[str]) -> str | None:
        found = map(self._names.search, texts)
        return next((match.group() for match in found if match is not None), None)


def find_surprises(
    pair: PreferencePair,
    texts: Sequence[str],  # the prompt, and both whole sequences
    special: SpecialText,
) -> dict[str, str]:
    """Kind -> example, of what is there to be seen in the rendered texts of messages."""
    found: dict[str, str] = {}
    messages = [*pair.prompt, *pair.chosen, *pair.rejected]
    contents = (message.get("content") for message in messages)
    control = special.first_in(text for text in contents if isinstance(text, str))
    if control is not None:
        found["control_text"] = control
    prompt, *sides = texts
    rests = [
        text[len(prompt) if text.startswith(prompt) else common_length(prompt, text) :]
        for text in sides
    ]
    start = _start_of_both(pair, rests)
    for messages, rest in zip((pair.chosen, pair.rejected), rests, strict=True):
        found = _compare(messages, rest, start) | found
    return found


def _start_of_both(pair: PreferencePair, rests: Sequence[str]) -> int:
    """Where both responses begin behind the same text, which may hold their words by chance."""
    chosen, rejected = (_content(side[0]) for side in (pair.chosen, pair.rejected))
    start = rests[0].find(chosen)
    while start >= 0:
        if rests[1].startswith(rejected, start):
            return start
        start = rests[0].find(chosen, start + 1)
    return 0


def _content(message: dict) -> str:
    return (message.get("content") or "").strip()


def _compare(messages: list[dict], rest: str, end: int) -> dict[str, str]:
    """`rest` is what the template made of the messages of a response, the first from `end` on."""
    found: dict[str, str] = {}
    for index, message in enumerate(messages):
        text = _content(message)
        if message["role"] != "assistant" or not text:
            continue
        start = rest.find(text, end)
        if start < 0:
            return {"rewritten": text[:_LONGEST]}
        if index == 0 and rest[:start].strip():
            found = {"template_text": rest[:start][:_LONGEST]}
        end = start + len(text)
    return found


def rewrites_history(texts: Sequence[str], history: str) -> bool:
    """Whether a whole sequence parts from the prompt before the place where it asks for a response.

    `history` is the prompt rendered without that request.
    """
    prompt, *sides = texts
    asks = common_length(prompt, history)
    return any(not side.startswith(prompt[:asks]) for side in sides)
