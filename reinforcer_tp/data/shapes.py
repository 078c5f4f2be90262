"""A row of a preference set -> a validated PreferencePair. The shapes of rows:

    context, response1, response2, overall_preference  HelpSteer3: messages
    prompt, chosen_response, rejected_response         dataset classes: messages, text becomes one
    context, completions [{rank, completion}, ...]     ranked, the lower rank is chosen: messages
    prompt, chosen, rejected                           TRL, explicit prompt: text or messages
    instruction, chosen, rejected, maybe input         Alpaca: text, becomes messages
    chosen, rejected                                   TRL, the prompt is what both begin with
    chosen, rejected with Human: and Assistant: turns  hh-rlhf: text

Optional columns: weight (>= 0), margin (a number), tie (bool), tools, chat_template_kwargs
(messages only), and what the reference model gives (TRL's precomputed log-probs): ref_chosen_logps
and ref_rejected_logps, each the sum of the log-probs of that response's tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from reinforcer_tp.data.pairs import (
    BadRow,
    Messages,
    PreferencePair,
    TaskDataSpec,
    UnusableRow,
    apply_spec,
    brief,
    check_messages,
    check_not_blank,
    check_pair,
    drop_nones,
    kind,
    names,
)
from reinforcer_tp.strict_json import parse_json

LARGEST = 3e38  # float32
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def pair_from_row(row: Mapping[str, Any], spec: TaskDataSpec | None = None) -> PreferencePair:
    """The pair a row holds, with the texts of `spec` put around its prompt.

    Columns that are null count as missing. BadRow: missing keys, a response that is empty or not
    text, an unknown role, a bad number in weight, margin or the reference's columns. UnusableRow:
    equal sides, sides of different prompts.
    """
    present = {key: value for key, value in row.items() if value is not None}
    pair = check_pair(_find_reader(present)(present))
    pair = replace(
        pair,
        weight=_number(present, "weight", 1.0, low=0.0),
        margin=_number(present, "margin", 0.0),
        reference=_reference(present),
        tie=pair.tie or _flag(present, "tie"),
        tools=_json_column(present, "tools", list) or None,  # some templates render [] too
        chat_template_kwargs=_json_column(present, "chat_template_kwargs", dict),
    )
    if not pair.is_chat and (pair.tools or pair.chat_template_kwargs):
        raise BadRow("text_row", "tools and chat_template_kwargs need messages, got text")
    if pair.chosen == pair.rejected:
        raise UnusableRow("identical")
    return pair if spec is None else apply_spec(pair, spec)


def format_helpsteer3(data: Mapping[str, Any]) -> dict[str, Any]:
    """HelpSteer3's keys -> prompt, chosen_response, rejected_response.

    Where overall_preference is below 0 response1 is chosen, else response2. 0 is a tie: filter such
    rows outside.
    """
    first_is_better = data["overall_preference"] < 0
    return {
        "prompt": data["context"],
        "chosen_response": data["response1" if first_is_better else "response2"],
        "rejected_response": data["response2" if first_is_better else "response1"],
    }


def _read_helpsteer3(row: dict) -> PreferencePair:
    preference = row["overall_preference"]
    if isinstance(preference, bool) or not isinstance(preference, (int, float)):
        raise BadRow("preference", f"overall_preference={brief(preference)}; expected a number")
    if math.isnan(preference):
        raise BadRow("preference", "overall_preference is NaN; expected a number")
    pair = _read_responses(format_helpsteer3(row))
    return replace(pair, tie=preference == 0, shape="HelpSteer3 rows (chat)")


def _read_responses(row: dict) -> PreferencePair:
    return PreferencePair(
        prompt=_as_messages(row["prompt"], "prompt", "user"),
        chosen=_as_messages(row["chosen_response"], "chosen_response", "assistant"),
        rejected=_as_messages(row["rejected_response"], "rejected_response", "assistant"),
        shape="prompt, chosen_response, rejected_response (chat)",
    )


def _read_ranked(row: dict) -> PreferencePair:
    completions = row["completions"]
    if not isinstance(completions, list) or len(completions) != 2:
        got = len(completions) if isinstance(completions, list) else type(completions).__name__
        raise BadRow("completions", f"completions: got {got}, expected a list of exactly 2")
    for item in completions:
        if not isinstance(item, dict) or not {"rank", "completion"} <= item.keys():
            raise BadRow(
                "completions", f"a completion is {brief(item)}; expected keys rank, completion"
            )
        rank = item["rank"]
        if isinstance(rank, bool) or not isinstance(rank, (int, float)) or rank != rank:
            raise BadRow("completions", f"rank={brief(rank)}; expected a number")
    best, worst = sorted(completions, key=lambda item: item["rank"])
    return PreferencePair(
        prompt=_as_messages(row["context"], "context", "user"),
        chosen=_as_messages(best["completion"], "completion", "assistant"),
        rejected=_as_messages(worst["completion"], "completion", "assistant"),
        tie=best["rank"] == worst["rank"],
        shape="context and ranked completions (chat)",
    )


def _read_instruction(row: dict) -> PreferencePair:
    texts = {name: row[name] for name in ("instruction", "input") if name in row}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise BadRow("not_text", f"{name} is {kind(text)}; expected text")
    return PreferencePair(
        prompt=_as_messages("\n".join(filter(None, texts.values())), "instruction", "user"),
        chosen=_as_messages(row["chosen"], "chosen", "assistant"),
        rejected=_as_messages(row["rejected"], "rejected", "assistant"),
        shape="instruction, input, chosen, rejected (chat)",
    )


def _read_chosen_rejected(row: dict) -> PreferencePair:
    """TRL's rules; a mixture that TRL does not define is read as messages."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(side, (str, list)):
            raise BadRow("not_text", f"{name} is {kind(side)}; expected text or a message list")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("not_text", "one side is text, the other messages; expected the same of both")
    if isinstance(chosen, str):
        if prompt is None:
            return _read_instruction(row) if "instruction" in row else _split_text(chosen, rejected)
        if isinstance(prompt, str):
            shape = "prompt, chosen, rejected (text)"
            return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, shape=shape)
    chosen = _as_messages(chosen, "chosen", "assistant")
    rejected = _as_messages(rejected, "rejected", "assistant")
    if prompt is None or not (_answers(chosen) or _answers(rejected)):
        return _split_messages(chosen, rejected)
    prompt = _as_messages(prompt, "prompt", "user")
    shape = "prompt, chosen, rejected (chat)"
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, shape=shape)


READERS: dict[tuple[str, ...], Callable[[dict], PreferencePair]] = {
    ("context", "response1", "response2", "overall_preference"): _read_helpsteer3,
    ("prompt", "chosen_response", "rejected_response"): _read_responses,
    ("context", "completions"): _read_ranked,
    ("chosen", "rejected"): _read_chosen_rejected,
}


def _find_reader(row: dict) -> Callable[[dict], PreferencePair]:
    for keys, reader in READERS.items():
        if row.keys() >= set(keys):
            return reader
    nearest = max(READERS, key=lambda keys: len(row.keys() & set(keys)) / len(keys))
    if not row.keys() & set(nearest):
        nearest = ("prompt", "chosen", "rejected")
    missing = [key for key in nearest if key not in row]
    expected = " and ".join(missing) + (" too" if len(missing) < len(nearest) else "")
    raise BadRow(
        "missing_keys",
        f"keys with a value: {names(row)}; expected {expected}; name the "
        "columns with data.prompt_key, data.chosen_key and data.rejected_key",
    )


def _split_text(chosen: str, rejected: str) -> PreferencePair:
    """TRL: the prompt is the longest common prefix, a space before the sides stays with them."""
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        check_not_blank(side, name)
    if all(side.startswith(HUMAN) and ASSISTANT in side for side in (chosen, rejected)):
        length, shape = _hh_rlhf_prompt_length(chosen, rejected), "hh-rlhf dialogues (text)"
    else:
        length, shape = _prompt_length(chosen, rejected), "chosen, rejected, prompt in both (text)"
        if length and chosen[length - 1] == " ":
            length -= 1
    prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    if not chosen.strip() or not rejected.strip():
        raise UnusableRow("empty_response")
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, shape=shape)


def _hh_rlhf_prompt_length(chosen: str, rejected: str) -> int:
    """The prompt ends with the last "Assistant:" that both share; no human speaks after it."""
    common = common_length(chosen, rejected)
    length = chosen.rfind(ASSISTANT, 0, common) + len(ASSISTANT)
    if length < len(ASSISTANT) or HUMAN in chosen[length:] or HUMAN in rejected[length:]:
        raise UnusableRow("different_prompts")
    return length


def _split_messages(chosen: Messages, rejected: Messages) -> PreferencePair:
    chosen, rejected = drop_nones(chosen), drop_nones(rejected)
    length = _prompt_length(chosen, rejected)
    pair = PreferencePair(
        prompt=chosen[:length],
        chosen=chosen[length:],
        rejected=rejected[length:],
        shape="chosen, rejected, prompt in both (chat)",
    )
    if not pair.prompt or not (_answers(pair.chosen) and _answers(pair.rejected)):
        check_messages(chosen, "chosen")
        check_messages(rejected, "rejected")
        raise UnusableRow("different_prompts")
    return pair


def _prompt_length(chosen: str | Messages, rejected: str | Messages) -> int:
    """Items both begin with, but for the last of either side (TRL's extract_prompt)."""
    return max(0, min(common_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1))


def common_length(first: Sequence, second: Sequence) -> int:
    """Items (characters, messages, token ids) that both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _answers(messages: Messages) -> bool:
    """Whether these begin with the assistant's message, and so are a response alone."""
    return isinstance(messages[0], dict) and messages[0].get("role") == "assistant"


def _as_messages(value: object, name: str, role: str) -> Messages:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise BadRow("not_text", f"{name} is {kind(value)}; expected text or a message list")
    if not value:
        raise BadRow("no_messages", f"{name} is an empty list; expected at least one message")
    return value


def _number(
    row: dict, name: str, default: float, *, low: float = -LARGEST, high: float = LARGEST
) -> float:
    value = row.get(name, default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        sign = " >= 0" if low == 0 else " <= 0" if high == 0 else ""
        raise BadRow(
            name,
            f"{name}={brief(value)}; expected a finite number{sign}; mend the row, or leave the "
            "column out with data.ignore_columns",
        )
    return float(value)


def _reference(row: dict) -> tuple[float, float] | None:
    """Sums of log-probs of the chosen and the rejected response."""
    missing = [name for name in REFERENCE_COLUMNS if name not in row]
    if len(missing) == 1:
        raise BadRow(
            "reference_columns",
            f"{missing[0]} has no value, but the other side's log-probs have; expected both or "
            "neither; leave both columns out with data.ignore_columns",
        )
    if missing:
        return None
    chosen, rejected = (_number(row, name, 0.0, high=0.0) for name in REFERENCE_COLUMNS)
    return chosen, rejected


def _flag(row: dict, name: str) -> bool:
    value = row.get(name, False)
    if not isinstance(value, bool):
        raise BadRow(name, f"{name}={brief(value)}; expected true or false")
    return value


def _json_column(row: dict, name: str, expected: type) -> Any:
    """A column that may come as JSON text (TRL)."""
    value = row.get(name)
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise BadRow(name, f"{name} is text but not JSON ({error}); expected JSON") from None
    if value is not None and not isinstance(value, expected):
        raise BadRow(name, f"{name} is {kind(value)}; expected a {expected.__name__}")
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        raise BadRow(name, f"{name} has the keys {names(value)}; expected text as keys")
    return drop_nones(value)
