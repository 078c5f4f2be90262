"""Generated rows, sound and broken, each with the fates that it may have."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.faults.odd_text import odd_text

LIMIT = 3000  # max_total_sequence_length of the rows' runs
USED = frozenset({""})


@dataclass(frozen=True)
class Case:
    """`whole` are the texts a model sees, without the template: the prompt and both responses."""

    row: Any
    fates: frozenset[str]  # reasons for which it may be dropped; "" = it may be used
    prompt: str | list | None = None
    chosen: str | list | None = None
    rejected: str | list | None = None
    tools: list | None = None


def say(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def make_cases(seed: int, count: int) -> list[Case]:
    """`count` cases, the first one sound; the same ones for a seed."""
    random_ = random.Random(seed)
    cases = [_sound(random_)]
    while len(cases) < count:
        cases.append(_sound(random_) if random_.random() < 0.55 else _broken(random_))
    return cases


def _response(random_: random.Random, name: str) -> str:
    """Never blank, never equal to the other side's, not only special tokens."""
    return f"{odd_text(random_)}{name} {random_.randint(0, 9)}{odd_text(random_)}"


def _turns(random_: random.Random) -> list[dict]:
    messages = [say("system", odd_text(random_))] if random_.random() < 0.3 else []
    for _ in range(random_.choice((0, 0, 0, 1, 2))):
        messages += [say("user", odd_text(random_)), say("assistant", odd_text(random_))]
    return [*messages, say("user", odd_text(random_))]


def _sound(random_: random.Random) -> Case:
    prompt, chosen, rejected = (
        odd_text(random_),
        _response(random_, "yes"),
        _response(random_, "no"),
    )
    kind = random_.choice(("text", "text", "chat", "responses", "helpsteer", "ranked", "both"))
    if kind == "text":
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        fates = frozenset({"", "empty_prompt"}) if len(prompt.encode()) < 4 else USED
        return Case(_with_columns(row, random_), fates, prompt, chosen, rejected)
    turns = _turns(random_)
    sides = [say("assistant", chosen)], [say("assistant", rejected)]
    row, tools = _chat_row(kind, turns, sides, random_), None
    if random_.random() < 0.1:
        tools = [{"name": odd_text(random_), "parameters": {"deep": [[[1]]]}}]
        row["tools"] = tools
    return Case(_with_columns(row, random_), USED, turns, *sides, tools)


def _chat_row(kind: str, turns: list, sides: tuple, random_: random.Random) -> dict:
    chosen, rejected = sides
    if kind == "responses":
        return {"prompt": turns, "chosen_response": chosen, "rejected_response": rejected}
    if kind == "helpsteer":
        first = random_.random() < 0.5
        responses = (chosen, rejected) if first else (rejected, chosen)
        names = ("context", "response1", "response2", "overall_preference")
        return dict(zip(names, (turns, *responses, -1 if first else 3), strict=True))
    if kind == "ranked":
        items = [{"rank": 2, "completion": rejected}, {"rank": 0.5, "completion": chosen}]
        return {"context": turns, "completions": items}
    if kind == "both":
        return {"chosen": [*turns, *chosen], "rejected": [*turns, *rejected]}
    return {"prompt": turns, "chosen": chosen, "rejected": rejected}


def _with_columns(row: dict, random_: random.Random) -> dict:
    columns = {
        "weight": (0, 0.0, 1e-40, 2.5, 1e30),
        "margin": (-1e30, -0.0, 3, 2.9e38),
        "extra": ("x", None, [1], {"a": {}}),
    }
    for name, values in columns.items():
        if random_.random() < 0.1:
            row = row | {name: random_.choice(values)}
    return row


def _text(random_: random.Random, **changes: Any) -> dict:
    row = {"prompt": "q " + odd_text(random_), "chosen": "yes", "rejected": "no"}
    return row | changes


def _chat(random_: random.Random, **changes: Any) -> dict:
    row = {
        "prompt": _turns(random_),
        "chosen": [say("assistant", "yes")],
        "rejected": [say("assistant", "no")],
    }
    return row | changes


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


class _Opaque:
    """What a data set's class may hold beside plain values."""

    def __str__(self) -> str:
        raise RuntimeError("not to be shown")

    __repr__ = __str__


_BLANK = ("", " ", "\n\t ", "\u2028\u3000", "\x85\x1c")
_NOT_TEXT = (7, 0.5, True, {"a": 1}, ["x"], [[]], [None], b"yes", math.nan, 10**5000, nested(2000))
_BAD_NUMBERS = (math.nan, math.inf, -math.inf, -1e39, 1e39, "1", True, [1], 10**5000, _Opaque())


def _broken(random_: random.Random) -> Case:
    make, fates = random_.choice(BROKEN)
    return Case(make(random_), frozenset(fates))


def _ranks(first: Any, second: Any) -> dict:
    completions = [{"rank": first, "completion": "yes"}, {"rank": second, "completion": "no"}]
    return {"context": "q", "completions": completions}


def _both(value: Any) -> dict:
    return {"prompt": "q", "chosen": value, "rejected": value}


Make = Callable[[random.Random], Any]
# (a row, the reasons for which it may be dropped)
BROKEN: list[tuple[Make, tuple[str, ...]]] = [
    (lambda r: _text(r, chosen=r.choice(_BLANK)), ("empty_response",)),
    (lambda r: _chat(r, rejected=[say("assistant", r.choice(_BLANK))]), ("empty_response",)),
    (lambda r: _chat(r, chosen=r.choice(_BLANK)), ("not_text", "empty_response")),
    (
        lambda r: _text(r, chosen=r.choice(("</s>", " <s>\n</s>", "<|start|>"))),
        ("only_special_tokens",),
    ),
    (lambda r: _both("same " + odd_text(r)), ("identical",)),
    (lambda r: _text(r, chosen="no", rejected="no</s>"), ("identical",)),
    (lambda r: _text(r, prompt="x" * r.choice((LIMIT, 10**5))), ("overlong",)),
    (lambda r: _text(r, rejected="y " * LIMIT), ("overlong",)),
    (lambda r: _text(r, chosen=r.choice(_NOT_TEXT)), ("not_text", "not_a_message", "nested")),
    (lambda r: _chat(r, prompt=r.choice(_NOT_TEXT)), ("not_text", "not_a_message", "nested")),
    (lambda r: _chat(r, chosen=[say("assistant", r.choice(_NOT_TEXT))]), ("not_text", "nested")),
    (lambda r: _chat(r, prompt=[say("user", r.choice((None, 7, ["x"])))]), ("not_text",)),
    (lambda r: _chat(r, prompt=[{"role": "user"}]), ("not_text",)),
    (lambda r: _chat(r, prompt=[{"content": "q"}]), ("not_a_message",)),
    (lambda r: _chat(r, prompt=[{"a\nb": 1, 7: 2}]), ("not_a_message",)),
    (lambda r: _chat(r, prompt=[]), ("no_messages",)),
    (lambda r: _chat(r, chosen=[]), ("no_messages",)),
    (lambda r: _chat(r, prompt=[say("us\ner\x1b", "q")]), ("unknown_role",)),
    (
        lambda r: _chat(r, prompt=[say(r.choice((["user"], {"a": 1}, 7, nested(3000))), "q")]),
        ("unknown_role", "nested"),
    ),
    (lambda r: _chat(r, chosen=[say("user", "yes")]), ("response_roles", "different_prompts")),
    (lambda r: _chat(r, chosen=[say("assistant", "a"), say("user", "b")]), ("response_roles",)),
    (lambda r: {"prompt": "q", "chosen": "a"}, ("missing_keys",)),
    (lambda r: {"prompt": None, "chosen": None, "rejected": "a"}, ("missing_keys",)),
    (lambda r: {}, ("missing_keys",)),
    (lambda r: {"a\nb\x1b[31m": 1, "\ud800": 2, 7: 3}, ("missing_keys",)),
    (lambda r: {_Opaque(): 1}, ("missing_keys",)),
    (lambda r: r.choice((None, 7, "text", [1], nested(3000))), ("not_a_row",)),
    (lambda r: _text(r, weight=r.choice((*_BAD_NUMBERS, -1, -1e-300))), ("weight",)),
    (lambda r: _text(r, margin=r.choice(_BAD_NUMBERS)), ("margin",)),
    (lambda r: _text(r, tie=True), ("tie",)),
    (lambda r: _text(r, tie=r.choice((1, "yes", 0.0, math.nan))), ("tie",)),
    (lambda r: _text(r, ref_chosen_logps=-1.0), ("reference_columns",)),
    (lambda r: _text(r, ref_chosen_logps=1.0, ref_rejected_logps=-1.0), ("ref_chosen_logps",)),
    (lambda r: _text(r, tools=[{"name": "f"}]), ("text_row",)),
    (lambda r: _chat(r, tools="[" * 100_000), ("tools",)),
    (lambda r: _chat(r, tools="[" + "9" * 5000 + "]"), ("tools",)),
    (lambda r: _chat(r, tools='[{"a": 1, "a": 2}]'), ("tools",)),
    (lambda r: _chat(r, tools="[NaN]"), ("tools",)),
    (lambda r: _chat(r, tools='["\\ud800"]'), ("tools",)),
    (lambda r: _chat(r, tools=r.choice(("no json", "7", 7, {"a": 1}))), ("tools",)),
    (lambda r: _chat(r, tools=nested(r.choice((300, 900, 5000)))), ("nested",)),
    (lambda r: _chat(r, tools=[{"at": b"bytes"}]), ("not_json",)),
    (lambda r: _chat(r, chat_template_kwargs={"tokenize": True}), ("chat_template",)),
    (lambda r: _chat(r, chat_template_kwargs={7: True}), ("chat_template_kwargs",)),
    (lambda r: _chat(r, chat_template_kwargs="[1]"), ("chat_template_kwargs",)),
    (lambda r: _text(r, chosen="a\ud800b"), ("not_unicode",)),
    (lambda r: _text(r, prompt="q\udfff"), ("not_unicode",)),
    (lambda r: _chat(r, rejected=[say("assistant", "\ud83d half")]), ("not_unicode",)),
    (lambda r: _chat(r, prompt=[say("user", "\udc80")]), ("not_unicode",)),
    (lambda r: _ranks(1, 1), ("tie",)),
    (lambda r: _ranks(math.nan, 1), ("completions",)),
    (lambda r: _ranks("1", nested(3000)), ("completions",)),
    (
        lambda r: {"context": "q", "completions": r.choice(([], [1, 2], "xy", nested(3000)))},
        ("completions",),
    ),
    (
        lambda r: {"context": "q", "response1": "a", "response2": "b", "overall_preference": 0},
        ("tie",),
    ),
    (
        lambda r: {
            "context": "q",
            "response1": "a",
            "response2": "b",
            "overall_preference": math.nan,
        },
        ("preference",),
    ),
    (lambda r: {"chosen": "Human: a", "rejected": " "}, ("empty_response",)),
    (
        lambda r: {
            "chosen": [say("user", "a"), say("assistant", "b")],
            "rejected": [say("user", "c"), say("assistant", "d")],
        },
        ("different_prompts",),
    ),
]


class GeneratedRows:
    """A data set class, as users may write one, over the rows of `seed:count`."""

    on_bad_row = "drop"

    def __init__(self, train_data_path: str):
        seed, count = map(int, train_data_path.split(":"))
        self.formatted_ds = {"train": [case.row for case in make_cases(seed, count)]}


class StrictRows:
    """A sound row and the broken one of `number:seed`; a mistake in a row ends the preparation."""

    def __init__(self, train_data_path: str):
        number, seed = map(int, train_data_path.split(":"))
        random_ = random.Random(seed)
        self.formatted_ds = {"train": [_sound(random_).row, BROKEN[number][0](random_)]}
