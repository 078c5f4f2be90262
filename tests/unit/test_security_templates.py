"""A chat template that misbehaves ends in one clear error, soon, and harms nothing."""

import os
import resource
import time
from pathlib import Path

import pytest

from reinforcer_tp.data import PreferencePair, encode_pair
from reinforcer_tp.data.chat import EncodeOptions, PairEncoder
from reinforcer_tp.data.templates import (
    TEMPLATE_CHARACTERS,
    Conversation,
    Refusal,
    TemplateLimitError,
    render,
    stop_rendering,
)
from tests.unit.toy_tokenizer import toy_tokenizer

CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
PAIR = PreferencePair(
    prompt=[{"role": "user", "content": "q"}],
    chosen=[{"role": "assistant", "content": "a"}],
    rejected=[{"role": "assistant", "content": "b"}],
    shape="messages",
)
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set ns = namespace(x='xxxxxxxxxx') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
)
HOSTILE = {
    "range": ("{% for i in range(10**9) %}x{% endfor %}", "may not"),
    "loops": (LOOPS, "more than 2 s"),
    "a power, one call that Python cannot interrupt": ("{{ 10**(10**9) }}", "more than 2 s|memory"),
    "a sum, likewise": (
        "{% set a = range(99999)|list %}{% set ns = namespace(b=[]) %}"
        "{% for i in range(100) %}{% set ns.b = ns.b + a %}{% endfor %}"
        "{{ (ns.b|map('string')|map('list'))|sum(start=[])|length }}",
        "more than 2 s|memory",
    ),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "parentheses": ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "recursion|memory"),
    "a long text": ("{{ 'x' * 50000000 }}", "wrote 50,000,000 characters"),
    "a text without end": (DOUBLING, "memory"),
    "a large allocation": ("{{ 'x' * 10**12 }}", "memory"),
    "padding": ("{{ 'x'.ljust(10**12) }}", "memory"),
    "the class of a text": ("{{ ''.__class__.__mro__ }}", "may not.*__class__"),
    "the class by a filter": ("{{ (''|attr('__class__')).x }}", "may not.*__class__"),
    "globals of a function": ("{{ raise_exception.__globals__['os'] }}", "may not"),
    "a change of the rows": ("{{ messages.append(1) }}", "may not"),
    "too long itself": ("x" * (TEMPLATE_CHARACTERS + 1), "expected at most 1,048,576"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_stopped_and_this_process_is_as_before(name):
    template, says = HOSTILE[name]
    begin = time.monotonic()
    with pytest.raises(ValueError, match=says) as caught:
        encode_pair(PAIR, toy_tokenizer(chat_template=template))
    assert "\n" not in str(caught.value) and "policy.tokenizer.chat_template" in str(caught.value)
    assert time.monotonic() - begin < 15  # of a machine that does other things, too
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    assert encode_pair(PAIR, toy_tokenizer(chat_template=CHATML)).dropped == ""


def test_one_row_that_sets_it_off_is_enough():
    template = "{% if 'bomb' in messages[0].content %}" + LOOPS + "{% endif %}" + CHATML
    tokenizer = toy_tokenizer(chat_template=template)
    rows = [
        Conversation([{"role": "user", "content": text}], PAIR.chosen, PAIR.rejected, {})
        for text in ("q", "bomb", "q")
    ]
    assert render(tokenizer, rows[:1])[0][0] == "<user>q\n"
    with pytest.raises(TemplateLimitError, match="more than 2 s"):
        render(tokenizer, rows)
    assert render(tokenizer, rows[2:])[0][1] == "<user>q\n<assistant>a\n"


def test_the_limit_on_time_is_of_each_row_not_of_all():
    busy = "{% for i in range(40) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    tokenizer = toy_tokenizer(chat_template=busy + CHATML)
    row = Conversation(PAIR.prompt, PAIR.chosen, PAIR.rejected, {})
    begin = os.times()
    assert len(render(tokenizer, [row] * 100)) == 100
    stop_rendering()  # which adds the child's time to ours
    assert os.times().children_user - begin.children_user > 3


def test_rows_it_refuses_are_told_apart_and_texts_come_back_exactly():
    template = "{% if 'no' in messages[0].content %}{{ raise_exception('no\nno') }}{% endif %}"
    tokenizer = toy_tokenizer(chat_template=template + CHATML)
    texts = ["q", "no", "\ud800 half", "\0\U0001f600\u2028"]
    rows = [
        Conversation([{"role": "user", "content": text}], PAIR.chosen, PAIR.rejected, {})
        for text in texts
    ]
    found = render(tokenizer, rows)
    assert [isinstance(row, Refusal) for row in found] == [False, True, False, False]
    assert found[1] == "no no"
    for row, got in zip(rows, found, strict=True):
        if not isinstance(got, Refusal):
            ask = tokenizer.apply_chat_template
            assert got[0] == ask(row.prompt, add_generation_prompt=True, tokenize=False)
            assert got[2] == ask(row.prompt + row.rejected, tokenize=False)


def test_a_fault_of_the_template_is_a_mistake_of_the_row():
    for template in ("{{ 1 / 0 }}", "{{ messages[0].content.foo() }}", "{{ {}['a'].b }}"):
        found = encode_pair(PAIR, toy_tokenizer(chat_template=template))
        assert found.dropped == "chat_template" and "refuses the row" in found.mistake


def test_the_process_that_renders_ends_with_its_work_and_holds_no_file(tmp_path):
    secret = open(tmp_path / "open", "w")  # noqa: SIM115
    PairEncoder(toy_tokenizer(chat_template=CHATML), EncodeOptions()).encode([PAIR])
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    [pid] = [c for c in children if _opens(c) <= {"/dev/null", "pipe"}]
    stop_rendering()
    assert not Path(f"/proc/{pid}").exists()
    secret.close()


def _opens(pid: str) -> set[str]:
    links = Path(f"/proc/{pid}/fd").iterdir()
    return {str(link.readlink()).partition(":")[0] for link in links}
