"""What a preference pair is, and what it must hold to be trained on.

Text stays text and is tokenized as it is; lists of messages go through the chat template.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reinforcer_tp.strict_json import DEPTH

Messages = list[dict[str, Any]]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SIDES = ("prompt", "chosen", "rejected")


class BadRow(ValueError):
    """A mistake in a row: `reason` is its short name, the message says what, expected and fix."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class UnusableRow(Exception):
    """A sound row that cannot be trained on: dropped and counted under `reason`."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """One prompt with a preferred and a less preferred response, all text or all messages."""

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    weight: float = 1.0  # multiplies both loss terms, >= 0
    margin: float = 0.0  # by how much the chosen side should beat the rejected one, in rewards
    reference: tuple[float, float] | None = None  # log-probs of the responses: chosen, rejected
    tie: bool = False  # neither side is preferred
    tools: list | None = None  # JSON schemas for the chat template
    chat_template_kwargs: dict | None = None  # over those of the configuration
    shape: str = ""  # what the row was recognised as, for the report

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)

    def to_json(self) -> str:
        return json.dumps(self.__dict__, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "PreferencePair":
        values = json.loads(text)
        if values["reference"] is not None:
            values["reference"] = tuple(values["reference"])
        return cls(**values)


@dataclass(frozen=True)
class TaskDataSpec:
    """What a dataset is called, and texts put around its prompts.

    `prompt_file`: a text in which {} stands for the first user message (or the text prompt);
    literal braces are doubled. `system_prompt_file`: a system message for rows that have none.
    ValueError when a file cannot be read or the former has no {}.
    """

    dataset_name: str | None = None
    prompt_file: str | os.PathLike | None = None
    system_prompt_file: str | os.PathLike | None = None
    prompt: str | None = field(init=False, default=None)
    system_prompt: str | None = field(init=False, default=None)

    def __post_init__(self):
        object.__setattr__(self, "prompt", _read_text(self.prompt_file, "prompt_file"))
        system_prompt = _read_text(self.system_prompt_file, "system_prompt_file")
        object.__setattr__(self, "system_prompt", system_prompt)
        if self.prompt is not None:
            _check_placeholder(self.prompt, self.prompt_file)


def check_pair(pair: PreferencePair) -> PreferencePair:
    """`pair` without null keys in its messages; BadRow where a side cannot be trained on."""
    if not pair.is_chat:
        for name in ("chosen", "rejected"):
            check_not_blank(getattr(pair, name), name)
        return pair
    sides = {name: check_messages(getattr(pair, name), name) for name in _SIDES}
    for name in ("chosen", "rejected"):
        roles = [message["role"] for message in sides[name]]
        if (roles[0], roles[-1]) != ("assistant", "assistant"):
            raise BadRow(
                "response_roles",
                f"{name} has the roles {', '.join(roles)}; expected it to begin and end with a "
                "message of the assistant; move the messages before it to the prompt",
            )
        if not any("tool_calls" in message for message in sides[name]):
            check_not_blank("".join(m.get("content", "") for m in sides[name]), name)
    return replace(pair, **sides)


def check_messages(messages: Messages, name: str) -> Messages:
    """`messages` without null keys; BadRow where one is no message of a known role with text."""
    messages = drop_nones(messages)
    for index, message in enumerate(messages):
        _check_message(message, f"{name}[{index}]")
    return messages


def _check_message(message: object, where: str) -> None:
    if not isinstance(message, dict) or "role" not in message:
        got = f"keys {names(message)}" if isinstance(message, dict) else kind(message)
        raise BadRow("not_a_message", f"{where} has {got}; expected the keys role and content")
    if not isinstance(message["role"], str) or message["role"] not in ROLES:
        raise BadRow(
            "unknown_role",
            f"{where} has role={brief(message['role'])}; expected one of {', '.join(ROLES)}",
        )
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and message.keys() - {"role", "name"}):
        raise BadRow(
            "not_text", f"{where} has content of type {kind(content)}; expected one string"
        )


def check_not_blank(text: str, name: str) -> None:
    if not text.strip():
        raise BadRow(
            "empty_response", f"the {name} response is empty; expected text; remove the row"
        )


def apply_spec(pair: PreferencePair, spec: TaskDataSpec) -> PreferencePair:
    """`pair` with the texts of `spec` put around its prompt."""
    prompt = pair.prompt
    if isinstance(prompt, str):
        if spec.system_prompt is not None:
            raise BadRow("text_row", "data.system_prompt_file needs chat rows; this row is text")
        return pair if spec.prompt is None else replace(pair, prompt=spec.prompt.format(prompt))
    if spec.prompt is not None:
        first = next((i for i, message in enumerate(prompt) if message["role"] == "user"), None)
        if first is None:
            raise BadRow("prompt_file", "data.prompt_file needs a user message; the row has none")
        text = spec.prompt.format(prompt[first]["content"])
        prompt = [*prompt[:first], prompt[first] | {"content": text}, *prompt[first + 1 :]]
    if spec.system_prompt is not None and prompt[0]["role"] not in ("system", "developer"):
        prompt = [{"role": "system", "content": spec.system_prompt}, *prompt]
    return replace(pair, prompt=prompt)


def _read_text(path: str | os.PathLike | None, name: str) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data.{name}={path} cannot be read ({error}); expected a text file in UTF-8"
        ) from error


def _check_placeholder(prompt: str, path: object) -> None:
    try:
        is_good = prompt.format("{sentinel}").count("{sentinel}") == 1
    except (LookupError, ValueError):
        is_good = False
    if not is_good:
        raise ValueError(
            f"data.prompt_file={path}: expected exactly one {{}} where the prompt goes; write "
            "literal braces twice"
        )


def drop_nones(value: Any, room: int = DEPTH) -> Any:
    """Without the nulls that Arrow adds to the structs of a column to make them alike.

    BadRow where lists and mappings are nested more than `room` deep.
    """
    if not isinstance(value, (dict, list)):
        return value
    if room == 0:
        raise BadRow("nested", f"a value is nested more than {DEPTH} deep; remove the row")
    if isinstance(value, list):
        return [drop_nones(item, room - 1) for item in value]
    return {key: drop_nones(item, room - 1) for key, item in value.items() if item is not None}


def kind(value: object) -> str:
    """A value as messages show it: its type and its beginning."""
    return "null" if value is None else f"{type(value).__name__} ({brief(value)})"


def brief(value: object) -> str:
    """The beginning of a value's repr, in one line whatever it is."""
    try:
        text = repr(value[:80] if isinstance(value, (str, bytes)) else value)
    except Exception as error:  # endless nesting, a number of 5,000 digits, code of the user's
        return f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 60 else f"{text[:57]}..."


def half_character(error: UnicodeEncodeError) -> str:
    code = ord(error.object[error.start])
    return f"the texts hold half of a character (U+{code:04X}); expected Unicode; mend the row"


def names(keys: Iterable[object]) -> str:
    """Column names as messages show them."""
    plain = (key if isinstance(key, str) and key.isprintable() else brief(key) for key in keys)
    text = ", ".join(plain) or "none"
    return text if len(text) <= 400 else f"{text[:397]}..."
