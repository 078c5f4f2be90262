"""Rows of every shape -> pairs, by hand-computed cases; mistakes are named, ties are flagged."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reinforcer_tp.data import PreferencePair, TaskDataSpec, format_helpsteer3
from reinforcer_tp.data.pairs import BadRow, UnusableRow
from reinforcer_tp.data.shapes import pair_from_row


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


SKY = [user("What color is the sky?")]
BLUE, GREEN = [assistant("It is blue.")], [assistant("It is green.")]
DIALOGUE = [system("Be brief."), user("Hi"), assistant("Hello"), *SKY]

# row -> (prompt, chosen, rejected)
ROWS = {
    "dataset class: text": (
        {"prompt": "2+2?", "chosen_response": "4", "rejected_response": "5"},
        ([user("2+2?")], [assistant("4")], [assistant("5")]),
    ),
    "dataset class: messages as prompt": (
        {"prompt": DIALOGUE, "chosen_response": "blue", "rejected_response": "green"},
        (DIALOGUE, [assistant("blue")], [assistant("green")]),
    ),
    "dataset class keys win over TRL's": (
        {"prompt": "q", "chosen_response": "a", "rejected_response": "b", "chosen": "x",
         "rejected": "y"},
        ([user("q")], [assistant("a")], [assistant("b")]),
    ),
    "TRL, text, explicit": (
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        ("The sky is", " blue.", " green."),
    ),
    "TRL, text, implicit: the space stays with the sides": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        ("The sky is", " blue.", " green."),
    ),
    "TRL, text, implicit: parted within a word": (
        {"chosen": "the cat", "rejected": "the car"},
        ("the ca", "t", "r"),
    ),
    "TRL, text, implicit: nothing shared, a space at the end": (
        {"chosen": "yes ", "rejected": "no"},
        ("", "yes ", "no"),
    ),
    "TRL, text, implicit: one begins with the other": (
        {"chosen": "abc", "rejected": "abcd"},
        ("ab", "c", "cd"),
    ),
    "TRL, messages, explicit": (
        {"prompt": SKY, "chosen": BLUE, "rejected": GREEN},
        (SKY, BLUE, GREEN),
    ),
    "TRL, messages, implicit": (
        {"chosen": SKY + BLUE, "rejected": SKY + GREEN},
        (SKY, BLUE, GREEN),
    ),
    "TRL, messages, implicit, several turns": (
        {"chosen": DIALOGUE + BLUE, "rejected": DIALOGUE + GREEN},
        (DIALOGUE, BLUE, GREEN),
    ),
    "a text prompt beside whole conversations is only a copy": (
        {"prompt": "What color is the sky?", "chosen": SKY + BLUE, "rejected": SKY + GREEN},
        (SKY, BLUE, GREEN),
    ),
    "a text prompt with messages of the assistant": (
        {"prompt": "What color is the sky?", "chosen": BLUE, "rejected": GREEN},
        (SKY, BLUE, GREEN),
    ),
    "Alpaca": (
        {"instruction": "What color is the sky?", "input": "", "output": "It is grey.",
         "chosen": "It is blue.", "rejected": "It is green."},
        (SKY, BLUE, GREEN),
    ),
    "Alpaca with an input": (
        {"instruction": "Add.", "input": "2, 2", "chosen": "4", "rejected": "5"},
        ([user("Add.\n2, 2")], [assistant("4")], [assistant("5")]),
    ),
    "Alpaca, input missing": (
        {"instruction": "Add.", "input": None, "chosen": "4", "rejected": "5"},
        ([user("Add.")], [assistant("4")], [assistant("5")]),
    ),
    "a prompt wins over an instruction": (
        {"prompt": "p", "instruction": "other", "chosen": "a", "rejected": "b"},
        ("p", "a", "b"),
    ),
    "whole conversations win over an instruction": (
        {"instruction": "other", "chosen": SKY + BLUE, "rejected": SKY + GREEN},
        (SKY, BLUE, GREEN),
    ),
    "hh-rlhf": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: the one",
         "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: the other"},
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " the one", " the other"),
    ),
    "ranked: the lower rank is chosen": (
        {"context": SKY, "completions": [{"rank": 1, "completion": GREEN},
                                         {"rank": 0, "completion": BLUE}]},
        (SKY, BLUE, GREEN),
    ),
    "HelpSteer3, first better": (
        {"context": SKY, "response1": "It is blue.", "response2": "It is green.",
         "overall_preference": -1},
        (SKY, BLUE, GREEN),
    ),
    "HelpSteer3, second better": (
        {"context": SKY, "response1": "It is green.", "response2": "It is blue.",
         "overall_preference": 3},
        (SKY, BLUE, GREEN),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_shapes(name):
    row, expected = ROWS[name]
    pair = pair_from_row(row)
    assert (pair.prompt, pair.chosen, pair.rejected) == expected
    assert (pair.weight, pair.tie, pair.margin, pair.reference) == (1.0, False, 0.0, None)
    assert PreferencePair.from_json(pair.to_json()) == pair


def test_helpsteer3_keys_and_ties():
    row = {"context": SKY, "response1": "one", "response2": "two"}
    for preference, chosen, rejected in ((-3, "one", "two"), (0, "two", "one"), (1, "two", "one")):
        found = format_helpsteer3(row | {"overall_preference": preference})
        assert found == {"prompt": SKY, "chosen_response": chosen, "rejected_response": rejected}
        assert pair_from_row(row | {"overall_preference": preference}).tie is (preference == 0)


def test_ties_of_ranks_and_of_the_tie_column():
    completions = [{"rank": 1, "completion": BLUE}, {"rank": 1, "completion": GREEN}]
    assert pair_from_row({"context": SKY, "completions": completions}).tie
    row = {"prompt": "q", "chosen_response": "a", "rejected_response": "b", "tie": True}
    assert pair_from_row(row).tie


def test_nulls_that_arrow_adds_are_no_keys():
    message = {"role": "assistant", "content": "It is blue.", "tool_calls": None, "name": None}
    pair = pair_from_row({"prompt": SKY, "chosen": [message], "rejected": GREEN, "weight": None})
    assert pair.chosen == BLUE
    assert pair.weight == 1.0


def test_tool_calls_stand_for_text():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    result = {"role": "tool", "name": "f", "content": "7"}
    chosen = [call, result, assistant("seven")]
    row = {"prompt": SKY, "chosen": chosen, "rejected": [call], "tools": '[{"name": "f"}]'}
    pair = pair_from_row(row)
    assert (pair.chosen, pair.rejected, pair.tools) == (chosen, [call], [{"name": "f"}])


TEXT = {"prompt": "p", "chosen": "a", "rejected": "b"}
RESPONSES = {"prompt": "p", "chosen_response": "a", "rejected_response": "b"}
CHAT = {"prompt": SKY, "chosen": BLUE, "rejected": GREEN}
MISTAKES = [
    ({"prompt": "p", "chosen": "a"}, "missing_keys", ["prompt, chosen;", "rejected too"]),
    (TEXT | {"rejected": None}, "missing_keys", ["prompt, chosen;", "rejected too"]),
    ({"question": "q", "good": "g"}, "missing_keys", ["question, good", "data.prompt_key"]),
    (RESPONSES | {"rejected_response": None}, "missing_keys", ["rejected_response too"]),
    (TEXT | {"chosen": ""}, "empty_response", ["chosen", "empty"]),
    (TEXT | {"rejected": " \n"}, "empty_response", ["rejected"]),
    (RESPONSES | {"chosen_response": ""}, "empty_response", ["chosen"]),
    (CHAT | {"chosen": [assistant("")]}, "empty_response", ["chosen"]),
    (TEXT | {"chosen": 7}, "not_text", ["chosen is int (7)"]),
    (TEXT | {"rejected": BLUE}, "not_text", ["the same of both"]),
    ({"instruction": 3, "chosen": "a", "rejected": "b"}, "not_text", ["instruction is int (3)"]),
    ({"instruction": "q", "input": [1], "chosen": "a", "rejected": "b"}, "not_text",
     ["input is list"]),
    ({"instruction": "q", "chosen": " ", "rejected": "b"}, "empty_response", ["chosen"]),
    (RESPONSES | {"prompt": 3.5}, "not_text", ["prompt is float"]),
    (CHAT | {"chosen": [assistant(None)]}, "not_text", ["chosen[0]", "null"]),
    (CHAT | {"chosen": [assistant([{"type": "text"}])]}, "not_text", ["content of type list"]),
    (CHAT | {"prompt": [{"role": "human", "content": "x"}]}, "unknown_role", ["'human'", "user"]),
    (CHAT | {"prompt": [{"from": "human", "value": "x"}]}, "not_a_message", ["from, value"]),
    (CHAT | {"prompt": ["hello"]}, "not_a_message", ["prompt[0]", "str"]),
    (CHAT | {"prompt": []}, "no_messages", ["prompt"]),
    (CHAT | {"chosen": [*SKY, *BLUE]}, "response_roles", ["user, assistant"]),
    (CHAT | {"chosen": [*BLUE, *SKY]}, "response_roles", ["assistant, user"]),
    (TEXT | {"weight": -1}, "weight", ["-1"]),
    (TEXT | {"weight": math.nan}, "weight", ["nan"]),
    (TEXT | {"weight": math.inf}, "weight", ["inf"]),
    (TEXT | {"weight": "2"}, "weight", ["'2'"]),
    (TEXT | {"weight": True}, "weight", ["True"]),
    (TEXT | {"margin": math.nan}, "margin", ["nan", "a finite number"]),
    (TEXT | {"margin": -math.inf}, "margin", ["-inf"]),
    (TEXT | {"margin": 1e39}, "margin", ["1e+39"]),  # no float32
    (TEXT | {"margin": "1"}, "margin", ["'1'"]),
    (TEXT | {"margin": False}, "margin", ["False"]),
    (TEXT | {"ref_chosen_logps": -1.0}, "reference_columns", ["ref_rejected_logps has no value"]),
    (TEXT | {"ref_rejected_logps": -1.0, "ref_chosen_logps": None}, "reference_columns",
     ["ref_chosen_logps has no value", "data.ignore_columns"]),
    (TEXT | {"ref_chosen_logps": -1.0, "ref_rejected_logps": 0.5}, "ref_rejected_logps",
     ["0.5", "a finite number <= 0"]),
    (TEXT | {"ref_chosen_logps": math.nan, "ref_rejected_logps": -1.0}, "ref_chosen_logps",
     ["nan"]),
    (TEXT | {"ref_chosen_logps": -math.inf, "ref_rejected_logps": -1.0}, "ref_chosen_logps",
     ["-inf"]),
    (TEXT | {"ref_chosen_logps": [-1.0], "ref_rejected_logps": -1.0}, "ref_chosen_logps",
     ["[-1.0]"]),
    (TEXT | {"tie": "no"}, "tie", ["'no'"]),
    (TEXT | {"tools": [{}]}, "text_row", ["tools"]),
    (CHAT | {"tools": "[{"}, "tools", ["JSON"]),
    (CHAT | {"chat_template_kwargs": [1]}, "chat_template_kwargs", ["list", "dict"]),
    ({"context": SKY, "completions": [{"rank": 0, "completion": BLUE}]}, "completions", ["got 1"]),
    ({"context": SKY, "completions": [{"rank": 0}, {"rank": 1}]}, "completions", ["rank, comp"]),
    ({"context": SKY, "completions": [{"rank": "0", "completion": BLUE}] * 2}, "completions",
     ["rank='0'"]),
    ({"context": SKY, "response1": "a", "response2": "b", "overall_preference": "-1"},
     "preference", ["'-1'"]),
    ({"context": SKY, "response1": "a", "response2": "b", "overall_preference": math.nan},
     "preference", ["NaN"]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason", "said"), MISTAKES)
def test_mistakes_are_named(row, reason, said):
    with pytest.raises(BadRow) as caught:
        pair_from_row(row)
    assert caught.value.reason == reason
    for text in (*said, "expected") if reason != "text_row" else said:
        assert text in str(caught.value)


HH = "\n\nHuman: {}\n\nAssistant:{}"
UNUSABLE = {
    "identical text": (TEXT | {"rejected": "a"}, "identical"),
    "identical messages": (CHAT | {"rejected": BLUE}, "identical"),
    "identical conversations": ({"chosen": SKY + BLUE, "rejected": SKY + BLUE}, "identical"),
    "identical hh-rlhf": ({"chosen": HH.format("a", " b"), "rejected": HH.format("a", " b")},
                          "identical"),
    "questions differ": ({"chosen": [user("x"), *BLUE], "rejected": [user("y"), *BLUE]},
                         "different_prompts"),
    "later questions differ": (
        {"chosen": [*DIALOGUE[:3], user("x"), *BLUE], "rejected": [*DIALOGUE, *BLUE]},
        "different_prompts"),
    "hh-rlhf: questions differ": (
        {"chosen": HH.format("a", " b"), "rejected": HH.format("c", " b")}, "different_prompts"),
    "hh-rlhf: later questions differ": (
        {"chosen": HH.format("a", " b") + HH.format("c", " d"),
         "rejected": HH.format("a", " b") + HH.format("e", " d")},
        "different_prompts"),
    "hh-rlhf: no answer": ({"chosen": HH.format("a", " b"), "rejected": HH.format("a", " ")},
                           "empty_response"),
    "implicit, nothing but the prompt": ({"chosen": "Hi ", "rejected": "Hi there"},
                                         "empty_response"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_rows_to_drop(name):
    row, reason = UNUSABLE[name]
    with pytest.raises(UnusableRow) as caught:
        pair_from_row(row)
    assert caught.value.reason == reason


def test_unknown_roles_in_conversations_are_mistakes_not_other_prompts():
    row = {
        "chosen": [{"role": "gpt", "content": "x"}],
        "rejected": [{"role": "gpt", "content": ""}],
    }
    with pytest.raises(BadRow, match="'gpt'"):
        pair_from_row(row)


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_implicit_text_prompts_lose_nothing_and_share_all(prompt, chosen, rejected):
    """Sides put together again are the row's; the prompt is as long as can be (TRL's rule)."""
    chosen, rejected = f"{prompt}x{chosen}", f"{prompt}x{rejected}"
    try:
        pair = pair_from_row({"chosen": chosen, "rejected": rejected})
    except UnusableRow as dropped:
        assert chosen == rejected or dropped.reason == "empty_response"
        return
    assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (chosen, rejected)
    starts_alike = pair.chosen[0] == pair.rejected[0]
    assert not starts_alike or pair.chosen[0] == " " or 1 in (len(pair.chosen), len(pair.rejected))


def test_prompt_and_system_prompt_files(tmp_path):
    (tmp_path / "prompt.txt").write_text("Question: {}\nAnswer in {{braces}}:")
    (tmp_path / "system.txt").write_text("You are terse.")
    spec = TaskDataSpec(
        dataset_name="x",
        prompt_file=tmp_path / "prompt.txt",
        system_prompt_file=tmp_path / "system.txt",
    )
    asked = user("Question: {why}\nAnswer in {braces}:")
    row = {"prompt": "{why}", "chosen_response": "a", "rejected_response": "b"}
    assert pair_from_row(row, spec).prompt == [system("You are terse."), asked]
    row["prompt"] = [system("Mine."), user("{why}"), assistant("because"), user("and?")]
    expected = [system("Mine."), asked, assistant("because"), user("and?")]
    assert pair_from_row(row, spec).prompt == expected
    text = TaskDataSpec(prompt_file=tmp_path / "prompt.txt")
    assert pair_from_row(TEXT, text).prompt == "Question: p\nAnswer in {braces}:"
    with pytest.raises(BadRow, match="system_prompt_file needs chat rows"):
        pair_from_row(TEXT, spec)


@pytest.mark.parametrize("text", ["no place", "{} and {}", "{name}", "{0} {", "{1}"])
def test_prompt_files_without_one_place_are_refused(tmp_path, text):
    (tmp_path / "prompt.txt").write_text(text)
    with pytest.raises(ValueError, match=r"prompt\.txt.*expected exactly one \{\}"):
        TaskDataSpec(prompt_file=str(tmp_path / "prompt.txt"))


def test_missing_prompt_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.system_prompt_file=.*nowhere\.txt cannot be read"):
        TaskDataSpec(system_prompt_file=tmp_path / "nowhere.txt")


def test_weights_and_template_variables_pass():
    row = CHAT | {"weight": 0, "chat_template_kwargs": json.dumps({"enable_thinking": False})}
    pair = pair_from_row(row)
    assert (pair.weight, pair.chat_template_kwargs) == (0.0, {"enable_thinking": False})


@given(st.floats(-3e38, 3e38), st.floats(-3e38, 0), st.floats(-3e38, 0))
def test_margins_and_reference_log_probs_pass_exactly(margin, chosen, rejected):
    row = TEXT | {"margin": margin, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    pair = pair_from_row(row)
    assert (pair.margin, pair.reference) == (margin, (chosen, rejected))
    assert PreferencePair.from_json(pair.to_json()) == pair
