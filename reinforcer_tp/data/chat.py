"""PreferencePair -> token ids of prompt P, chosen C and rejected R.

Messages: the ids of what the chat template renders, and nothing else. Text: the tokenizer's own
special tokens in front, EOS once at the end of each side. P is what the prompt's ids share with
both whole sequences, and a response is everything after it: P + C and P + R are always the ids of
the whole texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from reinforcer_tp.data.hub import one_line
from reinforcer_tp.data.pairs import PreferencePair, brief, half_character
from reinforcer_tp.data.pieces import PieceTokenizer
from reinforcer_tp.data.shapes import common_length
from reinforcer_tp.data.surprises import SpecialText, find_surprises, rewrites_history
from reinforcer_tp.data.templates import Conversation, Refusal, Rendered, render
from reinforcer_tp.data.tokenizer import check_tokenizer, load_tokenizer, text_start

__all__ = ["EncodeOptions", "EncodedPair", "PairEncoder", "encode_pair", "load_tokenizer"]

# Arguments of apply_chat_template that are not the template's.
RESERVED_KWARGS = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """What decides the ids beside the tokenizer."""

    max_total_sequence_length: int | None = None  # tokens of prompt + response of a side
    overlong: Literal["drop", "truncate_prompt", "truncate_response"] = "drop"
    on_boundary_mismatch: Literal["longest_common_prefix", "error", "drop"] = (
        "longest_common_prefix"
    )
    chat_template_kwargs: dict[str, Any] | None = None  # variables for the template

    def __post_init__(self):
        taken = RESERVED_KWARGS & set(self.chat_template_kwargs or {})
        if taken:
            raise ValueError(
                f"policy.tokenizer.chat_template_kwargs has {', '.join(sorted(taken))}; expected "
                "variables of the template only"
            )


@dataclass(frozen=True, kw_only=True)
class EncodedPair:
    """Ids of a pair, or why there are none."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    dropped: str = ""  # reason; "" = usable
    mistake: str = ""  # what is wrong with the row, where `dropped` is a mistake of the data
    boundary_mismatch: str | None = None  # end of the prompt that is no prefix of both sides
    is_truncated: bool = False
    surprises: dict[str, str] = field(default_factory=dict)  # kind -> example, see surprises.py


class _Texts(NamedTuple):
    prompt: str
    chosen: str  # the prompt and the response
    rejected: str  # likewise


def encode_pair(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> EncodedPair:
    """The ids of one pair; `options` are the fields of EncodeOptions."""
    return PairEncoder(tokenizer, EncodeOptions(**options)).encode([pair])[0]


class PairEncoder:
    """Tokenizes pairs. ValueError where the tokenizer lacks what the pairs need."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: EncodeOptions):
        self.tokenizer, self.options = tokenizer, options
        self.start = text_start(tokenizer)
        no_text = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        unknown = {tokenizer.unk_token_id} - no_text  # special to transformers, but it is text
        self.special_ids = set(tokenizer.all_special_ids) - unknown
        self.unknown_ids = {tokenizer.unk_token_id} - no_text - {None}
        self.special_text = SpecialText(tokenizer)
        self.pieces = PieceTokenizer(tokenizer)

    def encode(self, pairs: Sequence[PreferencePair]) -> list[EncodedPair]:
        """The ids of every pair, tokenized together; each result depends on its own pair alone."""
        check_tokenizer(self.tokenizer, (pair.is_chat for pair in pairs))
        rendered = self._render(pairs)
        ids = iter(self._ids_of([group for group in rendered if isinstance(group, _Texts)]))
        return [
            self._finish(pair, group, next(ids)) if isinstance(group, _Texts) else group
            for pair, group in zip(pairs, rendered, strict=True)
        ]

    def _finish(
        self, pair: PreferencePair, texts: _Texts, ids: list[list[int]] | EncodedPair
    ) -> EncodedPair:
        if isinstance(ids, EncodedPair):
            return ids
        encoded = self._split(pair, *ids)
        if encoded.dropped:
            return encoded
        surprises = find_surprises(pair, texts, self.special_text) if pair.is_chat else {}
        if any(not self.unknown_ids.isdisjoint(side) for side in ids):
            surprises["unknown_text"] = brief(texts.chosen)
        return replace(encoded, surprises=surprises) if surprises else encoded

    def _render(self, pairs: Sequence[PreferencePair]) -> list[_Texts | EncodedPair]:
        asked = [self._ask(pair) for pair in pairs]
        conversations = [row for row in asked if isinstance(row, Conversation)]
        answers = iter(zip(conversations, render(self.tokenizer, conversations), strict=True))
        rendered = [
            self._check_history(*next(answers)) if isinstance(row, Conversation) else row
            for row in asked
        ]
        return [_not_unicode(group) or group for group in rendered]

    def _check_history(self, row: Conversation, answer: Rendered) -> _Texts | EncodedPair:
        """What comes before the response must be the same text with the response as without."""
        if isinstance(answer, Refusal) or all(side.startswith(answer[0]) for side in answer[1:]):
            return _texts_or_mistake(answer)
        (alone,) = render(self.tokenizer, [row._replace(chosen=[], rejected=[])])
        if not isinstance(alone, Refusal) and rewrites_history(answer, alone[1]):
            return _dropped("template_rewrites_prompt", None)
        return _texts_or_mistake(answer)

    def _ask(self, pair: PreferencePair) -> Conversation | _Texts | EncodedPair:
        """What the template shall render; the texts where there is none; or a mistake."""
        for name in ("chosen", "rejected"):
            text = _response_text(getattr(pair, name))
            if text and self.special_text.is_all_of(text):
                return _mistake(
                    "only_special_tokens",
                    f"the {name} response is only special tokens ({brief(text)}); expected text",
                )
        prompt = pair.prompt
        if isinstance(prompt, str):
            return _Texts(prompt, prompt + pair.chosen, prompt + pair.rejected)
        kwargs = (self.options.chat_template_kwargs or {}) | (pair.chat_template_kwargs or {})
        if RESERVED_KWARGS & kwargs.keys():
            taken = ", ".join(sorted(RESERVED_KWARGS & kwargs.keys()))
            return _texts_or_mistake(Refusal(f"chat_template_kwargs has {taken}"))
        if pair.tools and "tools" not in str(self.tokenizer.chat_template):
            return _texts_or_mistake(Refusal("there are tools, which it never mentions"))
        kwargs |= {"tools": pair.tools}
        return Conversation(prompt, pair.chosen, pair.rejected, kwargs)

    def _ids_of(self, rows: list[_Texts]) -> list[list[list[int]] | EncodedPair]:
        """Ids of the three texts of every row, or why the tokenizer refuses it."""
        try:
            ids = self._tokenize([text for texts in rows for text in texts])
        except Exception as error:  # the edge to the tokenizer's code: which row was it?
            if len(rows) > 1:
                return [self._ids_of([texts])[0] for texts in rows]
            text = f"the tokenizer refuses the row: {one_line(error)}"
            return [_mistake("tokenizer", text)]
        return [ids[i : i + 3] for i in range(0, len(ids), 3)]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.pieces(texts)

    def _split(
        self, pair: PreferencePair, prompt: list[int], chosen: list[int], rejected: list[int]
    ) -> EncodedPair:
        """`chosen` and `rejected` are whole sequences, prompt and response."""
        if not pair.is_chat:
            prompt = self._begin(prompt)
            chosen, rejected = (self._end(self._begin(side)) for side in (chosen, rejected))
        length = min(common_length(prompt, side) for side in (chosen, rejected))
        mismatch = None if length == len(prompt) else self.tokenizer.decode(prompt[length:])
        prompt, chosen, rejected = prompt[:length], chosen[length:], rejected[length:]
        for name, response in (("chosen", chosen), ("rejected", rejected)):
            if self.special_ids.issuperset(response):
                return _mistake(
                    "only_special_tokens",
                    f"the {name} response gives no tokens but special ones; expected text",
                )
        if mismatch is not None and self.options.on_boundary_mismatch == "error":
            return _mistake(
                "boundary_mismatch",
                f"the prompt's end {brief(mismatch)} is not tokenized alike in the whole "
                "sequences; set data.on_boundary_mismatch to longest_common_prefix or drop",
                mismatch,
            )
        if mismatch is not None and self.options.on_boundary_mismatch == "drop":
            return _dropped("boundary_mismatch", mismatch)
        if not prompt:  # no position would predict the first response token
            return _dropped("empty_prompt", mismatch)
        if chosen == rejected:
            return _dropped("identical", mismatch)
        fitted = _fit(prompt, chosen, rejected, self.options, mismatch)
        if fitted.is_truncated and pair.reference is not None:
            return _mistake(
                "truncated_reference",
                f"data.overlong={self.options.overlong} cuts the row, but ref_chosen_logps and "
                "ref_rejected_logps are log-probs of the whole text; raise "
                "policy.max_total_sequence_length, set data.overlong=drop, or leave both columns "
                "out with data.ignore_columns",
                mismatch,
            )
        return fitted

    def _begin(self, ids: list[int]) -> list[int]:
        """`ids` with the tokenizer's start once, also where the text already spells it out."""
        return ids if ids[: len(self.start)] == self.start else self.start + ids

    def _end(self, ids: list[int]) -> list[int]:
        """`ids` with EOS once, also where the text already spells it out."""
        eos = self.tokenizer.eos_token_id
        return ids if ids[-1:] == [eos] else [*ids, eos]


def _fit(
    prompt: list[int],
    chosen: list[int],
    rejected: list[int],
    options: EncodeOptions,
    mismatch: str | None,
) -> EncodedPair:
    limit, longest = options.max_total_sequence_length, max(len(chosen), len(rejected))
    is_overlong = limit is not None and len(prompt) + longest > limit
    if is_overlong:
        if options.overlong == "drop":
            return _dropped("overlong", mismatch)
        if options.overlong == "truncate_prompt":
            room = limit - longest
            prompt = prompt[len(prompt) - room :]
        else:
            room = limit - len(prompt)
            chosen, rejected = chosen[:room], rejected[:room]
        if room < 1:
            return _dropped(f"overlong_after_{options.overlong}", mismatch)
        if chosen == rejected:
            return _dropped("identical_after_truncation", mismatch)
    return EncodedPair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        boundary_mismatch=mismatch,
        is_truncated=is_overlong,
    )


def _texts_or_mistake(rendered: Rendered) -> _Texts | EncodedPair:
    if isinstance(rendered, Refusal):
        return _mistake("chat_template", f"the chat template refuses the row: {rendered}")
    return _Texts(*rendered)


def _not_unicode(texts: _Texts | EncodedPair) -> EncodedPair | None:
    """The mistake of texts that no tokenizer takes."""
    try:
        for text in texts if isinstance(texts, _Texts) else ():
            text.encode()
    except UnicodeEncodeError as error:
        return _mistake("not_unicode", half_character(error))
    return None


def _response_text(response: str | list[dict]) -> str:
    """Empty where a response has more than text."""
    if isinstance(response, str):
        return response
    if any("tool_calls" in message for message in response):
        return ""
    return "".join(message.get("content", "") for message in response)


def _mistake(reason: str, text: str, mismatch: str | None = None) -> EncodedPair:
    return replace(_dropped(reason, mismatch), mistake=text)


def _dropped(reason: str, mismatch: str | None) -> EncodedPair:
    return EncodedPair(
        prompt=[], chosen=[], rejected=[], dropped=reason, boundary_mismatch=mismatch
    )
