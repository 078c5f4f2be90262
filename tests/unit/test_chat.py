"""Pairs -> ids, against ids spelled out by hand, the whole text's own ids, and real tokenizers."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforcer_tp.data import PreferencePair, encode_pair, load_tokenizer
from reinforcer_tp.data.chat import EncodedPair, EncodeOptions, PairEncoder
from reinforcer_tp.data.tokenizer import read_chat_template, tokenizer_fingerprint
from tests.unit.toy_tokenizer import CHATML, ids_of, toy_tokenizer

ASSETS = os.environ.get("REINFORCER_TP_ASSETS")
THINKING = (  # like Qwen3: an open thought in the generation prompt, an empty one when finished
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n<think>\n{% endif %}"
)


def chat(prompt, chosen, rejected, **kwargs):
    return PreferencePair(
        prompt=[{"role": "user", "content": prompt}],
        chosen=[{"role": "assistant", "content": chosen}],
        rejected=[{"role": "assistant", "content": rejected}],
        **kwargs,
    )


def text(prompt, chosen, rejected):
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected)


def sides(pair: EncodedPair):
    return pair.prompt, pair.chosen, pair.rejected


# Messages


@pytest.mark.parametrize("adds_bos", [False, True])
def test_messages_are_what_the_template_renders_and_nothing_else(adds_bos):
    """No BOS of the tokenizer's own, no EOS beside the template's, the turn's end is a response."""
    tokenizer = toy_tokenizer(chat_template=CHATML, adds_bos=adds_bos, adds_eos=adds_bos)
    pair = encode_pair(chat("hi", "yes", "no"), tokenizer)
    start = ids_of(tokenizer, "<|start|>", "user\nhi", "</s>", "\n", "<|start|>", "assistant\n")
    yes, no = (ids_of(tokenizer, word, "</s>", "\n") for word in ("yes", "no"))
    assert sides(pair) == (start, yes, no)
    assert (pair.dropped, pair.boundary_mismatch, pair.is_truncated) == ("", None, False)


def test_a_template_with_bos_gives_it_once():
    tokenizer = toy_tokenizer(chat_template="{{ bos_token }}" + CHATML, adds_bos=True)
    pair = encode_pair(chat("hi", "yes", "no"), tokenizer)
    assert pair.prompt[:2] == ids_of(tokenizer, "<s>", "<|start|>")
    assert sum(ids.count(tokenizer.bos_token_id) for ids in sides(pair)) == 1


def test_several_turns_and_template_variables():
    template = "{{ greeting }}" + CHATML
    tokenizer = toy_tokenizer(chat_template=template)
    messages = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v")]
    pair = PreferencePair(
        prompt=[{"role": role, "content": content} for role, content in messages],
        chosen=[{"role": "assistant", "content": "x"}],
        rejected=[{"role": "assistant", "content": "y"}],
    )
    turns = [p for r, c in messages for p in ("<|start|>", f"{r}\n{c}", "</s>", "\n")]
    last = ("<|start|>", "assistant\n")
    found = encode_pair(pair, tokenizer, chat_template_kwargs={"greeting": "Hey"})
    assert found.prompt == ids_of(tokenizer, "Hey", *turns, *last)
    row = PreferencePair(**vars(pair) | {"chat_template_kwargs": {"greeting": "Mine"}})
    found = encode_pair(row, tokenizer, chat_template_kwargs={"greeting": "Hey"})
    assert found.prompt == ids_of(tokenizer, "Mine", *turns, *last)


def test_tools_reach_the_template_or_are_refused():
    tokenizer = toy_tokenizer(chat_template="{% for t in tools %}{{ t.name }}{% endfor %}" + CHATML)
    pair = chat("hi", "yes", "no", tools=[{"name": "add"}])
    assert encode_pair(pair, tokenizer).prompt[:3] == ids_of(tokenizer, "add")
    found = encode_pair(pair, toy_tokenizer(chat_template=CHATML))
    assert "tools, which it never mentions" in found.mistake


def test_a_template_that_refuses_a_row_is_quoted():
    tokenizer = toy_tokenizer(chat_template="{{ raise_exception('only one user turn') }}")
    found = encode_pair(chat("hi", "yes", "no"), tokenizer)
    assert found.dropped == "chat_template"
    assert "only one user turn" in found.mistake


def test_arguments_of_the_renderer_are_no_template_variables():
    with pytest.raises(ValueError, match="chat_template_kwargs has tokenize;"):
        EncodeOptions(chat_template_kwargs={"tokenize": True})
    pair = chat("hi", "yes", "no", chat_template_kwargs={"add_generation_prompt": False})
    assert "add_gen" in encode_pair(pair, toy_tokenizer(chat_template=CHATML)).mistake


# Text


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("adds_eos", [False, True])
def test_text_has_the_tokenizers_own_start_and_one_eos(adds_bos, adds_eos):
    tokenizer = toy_tokenizer(adds_bos=adds_bos, adds_eos=adds_eos)
    bos = ["<s>"] if adds_bos else []
    pair = encode_pair(text("q ", "yes", "no"), tokenizer)
    assert sides(pair) == (
        ids_of(tokenizer, *bos, "q "),
        ids_of(tokenizer, "yes", "</s>"),
        ids_of(tokenizer, "no", "</s>"),
    )
    pair = encode_pair(text("q ", "yes</s>", "no"), tokenizer)
    assert pair.chosen == ids_of(tokenizer, "yes", "</s>")


def test_an_empty_prompt_is_bos_or_a_dropped_row():
    with_bos = toy_tokenizer(adds_bos=True)
    assert encode_pair(text("", "yes", "no"), with_bos).prompt == [with_bos.bos_token_id]
    assert encode_pair(text("", "yes", "no"), toy_tokenizer()).dropped == "empty_prompt"


# The border between prompt and response

MERGES = [("b", "c")]


def test_a_token_across_the_border_starts_the_response():
    """The prompt's b merges with a c behind it: P ends before it, for both sides alike."""
    tokenizer = toy_tokenizer(merges=MERGES)
    pair = encode_pair(text("ab", "c", "d"), tokenizer)
    assert sides(pair) == (
        ids_of(tokenizer, "a"),
        ids_of(tokenizer, "bc", "</s>"),
        ids_of(tokenizer, "b", "d", "</s>"),
    )
    assert pair.boundary_mismatch == "b"


@pytest.mark.parametrize(
    ("mode", "dropped", "said"),
    [("longest_common_prefix", "", ""), ("drop", "boundary_mismatch", ""),
     ("error", "boundary_mismatch", "the prompt's end 'b' is not tokenized alike")],
)  # fmt: skip
def test_what_happens_on_a_boundary_mismatch(mode, dropped, said):
    tokenizer = toy_tokenizer(merges=MERGES)
    found = encode_pair(text("ab", "c", "d"), tokenizer, on_boundary_mismatch=mode)
    assert (found.dropped, found.boundary_mismatch) == (dropped, "b")
    assert found.mistake.startswith(said) and bool(found.mistake) == bool(said)
    fine = encode_pair(text("ab", "x", "d"), tokenizer, on_boundary_mismatch=mode)
    assert (fine.dropped, fine.boundary_mismatch) == ("", None)


def test_a_border_that_leaves_no_prompt_drops_the_row():
    found = encode_pair(text("b", "c", "d"), toy_tokenizer(merges=MERGES))
    assert (found.dropped, found.boundary_mismatch) == ("empty_prompt", "b")


def test_an_open_thought_in_the_generation_prompt():
    """The prompt's "\\n" is followed by another one when finished, which is one token then."""
    newline = ids_of(toy_tokenizer(), "\n")
    symbol = toy_tokenizer().convert_ids_to_tokens(newline)[0]
    tokenizer = toy_tokenizer(merges=[(symbol, symbol)], chat_template=THINKING)
    pair = encode_pair(chat("hi", "yes", "no"), tokenizer)
    head = ("<|start|>", "user\nhi", "</s>", "\n", "<|start|>", "assistant\n<think>")
    thought = (symbol * 2, "</think>", symbol * 2)
    assert sides(pair) == (
        ids_of(tokenizer, *head),
        ids_of(tokenizer, *thought, "yes", "</s>", "\n"),
        ids_of(tokenizer, *thought, "no", "</s>", "\n"),
    )
    assert pair.boundary_mismatch == "\n"


# Over-long pairs: 4 prompt tokens, 5 chosen and 3 rejected ones with EOS

LONG = text("1234", "abcd", "xy")


@pytest.mark.parametrize(
    ("mode", "limit", "expected"),
    [
        ("drop", 9, ("1234", "abcd</s>", "xy</s>")),
        ("drop", 8, "overlong"),
        ("truncate_prompt", 9, ("1234", "abcd</s>", "xy</s>")),
        ("truncate_prompt", 8, ("234", "abcd</s>", "xy</s>")),
        ("truncate_prompt", 6, ("4", "abcd</s>", "xy</s>")),
        ("truncate_prompt", 5, "overlong_after_truncate_prompt"),
        ("truncate_prompt", 1, "overlong_after_truncate_prompt"),
        ("truncate_response", 8, ("1234", "abcd", "xy</s>")),
        ("truncate_response", 6, ("1234", "ab", "xy")),
        ("truncate_response", 5, ("1234", "a", "x")),
        ("truncate_response", 4, "overlong_after_truncate_response"),
        ("truncate_response", 2, "overlong_after_truncate_response"),
    ],
)
def test_overlong(mode, limit, expected):
    tokenizer = toy_tokenizer()
    found = encode_pair(LONG, tokenizer, overlong=mode, max_total_sequence_length=limit)
    if isinstance(expected, str):
        assert found.dropped == expected
        return
    pieces = [part.replace("</s>", " </s>").split() for part in expected]
    assert sides(found) == tuple(ids_of(tokenizer, *part) for part in pieces)
    assert found.is_truncated is (limit < 9)


@pytest.mark.parametrize("mode", ["truncate_prompt", "truncate_response"])
def test_log_probs_of_the_whole_text_do_not_go_with_a_cut_one(mode):
    pair = replace(LONG, reference=(-5.0, -6.0))
    found = encode_pair(pair, toy_tokenizer(), overlong=mode, max_total_sequence_length=8)
    assert found.dropped == "truncated_reference"
    assert f"data.overlong={mode} cuts the row, but ref_chosen_logps" in found.mistake
    fitting = encode_pair(pair, toy_tokenizer(), overlong=mode, max_total_sequence_length=9)
    assert (fitting.dropped, fitting.is_truncated) == ("", False)
    dropped = encode_pair(pair, toy_tokenizer(), overlong="drop", max_total_sequence_length=8)
    assert (dropped.dropped, dropped.mistake) == ("overlong", "")


def test_sides_that_truncation_makes_equal_are_dropped():
    pair = text("1234", "same and more", "same but less")
    options = {"overlong": "truncate_response", "max_total_sequence_length": 8}
    assert encode_pair(pair, toy_tokenizer(), **options).dropped == "identical_after_truncation"
    options["max_total_sequence_length"] = 10
    assert encode_pair(pair, toy_tokenizer(), **options).dropped == ""


def test_sides_of_equal_tokens_are_dropped():
    assert encode_pair(text("q", "a", "a</s>"), toy_tokenizer()).dropped == "identical"


# Responses without text


@pytest.mark.parametrize("response", ["</s>", " <s>\n</s>", "<|start|>"])
def test_responses_of_special_tokens_only_are_mistakes(response):
    tokenizer = toy_tokenizer(chat_template=CHATML)
    for pair in (text("q", "fine", response), chat("q", "fine", response)):
        found = encode_pair(pair, tokenizer)
        assert found.dropped == "only_special_tokens"
        assert "the rejected response is only special tokens" in found.mistake


def test_tokenizers_that_lack_what_rows_need_are_refused():
    tokenizer = toy_tokenizer(has_eos=False)
    with pytest.raises(ValueError, match=r"no chat template.*policy\.tokenizer\.chat_template"):
        encode_pair(chat("q", "a", "b"), tokenizer)
    with pytest.raises(ValueError, match="no EOS token"):
        encode_pair(text("q", "a", "b"), tokenizer)
    assert encode_pair(
        chat("q", "a", "b"), toy_tokenizer(has_eos=False, chat_template=CHATML)
    ).chosen


# Properties

WORDS = st.text(alphabet="abc \n\u00e9\U0001f600", min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS, WORDS, st.booleans()), min_size=1, max_size=6))
def test_sequences_are_the_ids_of_the_whole_texts(rows):
    """P + C and P + R are the whole texts' ids, P as long as it can be, in any batch."""
    tokenizer = TOY
    pairs = [(chat if is_chat else text)(p, f"{c}.", f"{r}!") for p, c, r, is_chat in rows]
    together = PairEncoder(tokenizer, EncodeOptions()).encode(pairs)
    for (p, c, r, is_chat), pair, found in zip(rows, pairs, together, strict=True):
        assert found == encode_pair(pair, tokenizer)
        if is_chat:
            opening = f"<|start|>user\n{p}</s>\n<|start|>assistant\n"
            whole = [f"{opening}{side}</s>\n" for side in (f"{c}.", f"{r}!")]
        else:
            opening, whole = f"<s>{p}", [f"<s>{p}{c}.</s>", f"<s>{p}{r}!</s>"]
        ids = [tokenizer(side, add_special_tokens=False)["input_ids"] for side in whole]
        assert [found.prompt + found.chosen, found.prompt + found.rejected] == ids
        assert tokenizer.decode(found.prompt + found.chosen) == whole[0]
        asked = tokenizer(opening, add_special_tokens=False)["input_ids"]
        shared = next(i for i in range(len(asked), -1, -1)
                      if all(side[:i] == asked[:i] for side in ids))  # fmt: skip
        assert len(found.prompt) == shared
        assert (found.boundary_mismatch is None) == (shared == len(asked))


TOY = toy_tokenizer(
    merges=[("a", "b"), ("c", "."), ("ab", "c."), ("b", "a"), ("c", "!")],
    adds_bos=True,
    chat_template=CHATML,
)


# Loading


def test_local_tokenizers_and_their_mistakes(tmp_path):
    toy_tokenizer(chat_template=CHATML).save_pretrained(tmp_path / "good")
    assert load_tokenizer(str(tmp_path / "good")).chat_template == CHATML
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages }}")
    loaded = load_tokenizer(str(tmp_path / "good"), str(template))
    assert loaded.chat_template == read_chat_template("{{ messages }}") == "{{ messages }}"
    (tmp_path / "empty").mkdir()
    for name, said in (("nowhere", "is no folder"), ("empty", "cannot be loaded")):
        with pytest.raises(ValueError, match=said) as caught:
            load_tokenizer(str(tmp_path / name))
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"chat_template=none\.jinja: expected Jinja text"):
        load_tokenizer(str(tmp_path / "good"), "none.jinja")


def test_no_code_of_a_tokenizer_folder_runs(tmp_path):
    toy_tokenizer().save_pretrained(tmp_path)
    config = (tmp_path / "tokenizer_config.json").read_text().rstrip().removesuffix("}")
    auto_map = '"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}'
    config = config.replace('"PreTrainedTokenizerFast"', '"Evil"').replace(
        '"TokenizersBackend"', '"Evil"'
    )
    (tmp_path / "tokenizer_config.json").write_text(f"{config}, {auto_map}}}")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass")
    try:
        load_tokenizer(str(tmp_path))
    except ValueError as error:
        assert "cannot be loaded" in str(error)
    assert not (tmp_path / "ran").exists()


def test_fingerprints_follow_what_decides_the_ids():
    def fresh(**kwargs):
        return tokenizer_fingerprint(toy_tokenizer(**kwargs))

    same = toy_tokenizer()
    same(["a", "bb"], padding=False, truncation=True, max_length=3)  # leaves state behind
    assert tokenizer_fingerprint(same) == fresh()
    variants = [
        {}, {"merges": [("a", "b")]}, {"adds_bos": True}, {"has_eos": False},
        {"chat_template": CHATML}, {"chat_template": CHATML + " "},
    ]  # fmt: skip
    assert len({fresh(**variant) for variant in variants}) == len(variants)


# Real tokenizers

TOKENIZERS = {
    "stories260k": False,
    "smollm2_135m_instruct": True,
    "tokenizers/mistral_v1_llama32k": True,
    "tokenizers/qwen": True,
}


@pytest.mark.skipif(not ASSETS, reason="REINFORCER_TP_ASSETS is not set")
@pytest.mark.parametrize("name", TOKENIZERS)
def test_real_tokenizers(name):
    """Text: the tokenizer's own ids of the whole text and EOS. Chat: apply_chat_template's ids."""
    tokenizer = load_tokenizer(str(Path(ASSETS) / name))
    for prompt, chosen, rejected in (
        ("The sky is", " blue.", " green, 12345!"),
        ("D\u00e9j\u00e0 vu\n\n", "\n  def f(x):\n\treturn x", "\u4f60\u597d \U0001f600"),
        ("Q: x", "y", "yy"),
    ):
        found = encode_pair(text(prompt, chosen, rejected), tokenizer)
        for ids, side in ((found.chosen, chosen), (found.rejected, rejected)):
            expected = [*tokenizer(prompt + side)["input_ids"], tokenizer.eos_token_id]
            assert found.prompt + ids == expected
        if not TOKENIZERS[name]:
            continue
        pair = chat(prompt, chosen, rejected)
        found = encode_pair(pair, tokenizer)
        for ids, side in ((found.chosen, pair.chosen), (found.rejected, pair.rejected)):
            rendered = tokenizer.apply_chat_template(pair.prompt + side, return_dict=False)
            assert found.prompt + ids == rendered
        asked = tokenizer.apply_chat_template(
            pair.prompt, add_generation_prompt=True, return_dict=False
        )
        assert found.prompt == asked[: len(found.prompt)]
        assert len(found.prompt) == len(asked) or found.boundary_mismatch
