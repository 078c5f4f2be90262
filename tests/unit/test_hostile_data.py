"""Rows, files and templates made to break the preparation: a clear line, or counted."""

import json
import math
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reinforcer_tp.data import encode_pair, files, format_report
from reinforcer_tp.data.dataset_classes import FileDataset
from reinforcer_tp.data.pairs import BadRow, TaskDataSpec
from reinforcer_tp.data.shapes import pair_from_row
from reinforcer_tp.strict_json import DEPTH, parse_json
from tests.unit.test_chat import chat, text
from tests.unit.test_prepare import (  # own_cache is a fixture of every test here
    jsonl,
    own_cache,  # noqa: F401
    prepare,
    run_set,
    text_row,
)
from tests.unit.toy_tokenizer import CHATML, ids_of, toy_tokenizer


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


class Unshown:
    def __repr__(self):
        raise RuntimeError("no")


CHAT = {"prompt": "q", "chosen_response": "a", "rejected_response": "b"}
BAD_ROWS = {
    "keys that are no text": ({"prompt": [{7: 1, "a\nb": 2}]}, "not_a_message"),
    "a row of objects": ({Unshown(): 1, "\ud800\x1b": 2}, "missing_keys"),
    "an endless role": ({"prompt": [{"role": nested(5000), "content": "q"}]}, "nested"),
    "endless tools": ({"tools": nested(500)}, "nested"),
    "tools as endless text": ({"tools": "[" * 100_000}, "tools"),
    "tools of 5,000 digits": ({"tools": "[" + "9" * 5000 + "]"}, "tools"),
    "tools with NaN": ({"tools": "[NaN]"}, "tools"),
    "variables without names": ({"chat_template_kwargs": {7: 1}}, "chat_template_kwargs"),
    "a number that is too long": ({"weight": 10**5000}, "weight"),
    "a weight of the user's": ({"weight": Unshown()}, "weight"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_no_message_can_show_is_still_named(name):
    change, reason = BAD_ROWS[name]
    row = change if reason == "missing_keys" else CHAT | change
    with pytest.raises(BadRow) as caught:
        pair_from_row(row, TaskDataSpec())
    assert caught.value.reason == reason
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_a_rank_that_is_no_number_does_not_choose_a_side():
    completions = [{"rank": math.nan, "completion": "a"}, {"rank": 1, "completion": "b"}]
    with pytest.raises(BadRow, match="rank=nan; expected a number"):
        pair_from_row({"context": "q", "completions": completions})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (text_row(1, chosen="a\ud800"), "not_unicode"),
        (CHAT | {"tools": [{"at": b"bytes"}]}, "not_json"),
    ],
)
def test_rows_that_cannot_be_written_are_dropped_or_named(tmp_path, row, reason):
    _, report = run_set([text_row(0), row], tmp_path, on_bad_row="drop")
    assert (report["used"], report["dropped"]) == (1, {reason: 1})
    with pytest.raises(ValueError, match=r"the rows, row 1 \(counted from 0\): the "):
        run_set([text_row(0), row], tmp_path)


def test_a_template_that_writes_half_a_character_is_named():
    tokenizer = toy_tokenizer(chat_template=CHATML + '{{ "\ud800" }}')
    found = encode_pair(chat("q", "a", "b"), tokenizer)
    assert found.dropped == "not_unicode" and "U+D800" in found.mistake


def test_a_row_that_the_tokenizer_refuses_does_not_take_the_others_with_it(tmp_path, monkeypatch):
    from reinforcer_tp.data.chat import PairEncoder

    real = PairEncoder._tokenize

    def fails(self, texts):
        if any("2?" in item for item in texts):
            raise Exception("no [UNK] token")
        return real(self, texts)

    monkeypatch.setattr(PairEncoder, "_tokenize", fails)
    _, report = run_set([text_row(i) for i in range(5)], tmp_path, on_bad_row="drop")
    assert (report["used"], report["dropped"]) == (4, {"tokenizer": 1})


def test_texts_without_a_token_are_no_crash():
    tokenizer = toy_tokenizer()
    tokenizer.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Replace(
        "\x00", ""
    )
    assert encode_pair(text("", "\x00", "b"), tokenizer).dropped == "only_special_tokens"


def test_text_that_spells_the_start_has_it_once():
    tokenizer = toy_tokenizer(adds_bos=True)
    pair = encode_pair(text("<s>q", "a", "b"), tokenizer)
    assert pair.prompt == ids_of(tokenizer, "<s>", "q")
    pair = encode_pair(text("", "<s>a", "<s>b"), tokenizer)
    assert (pair.prompt, pair.chosen) == (ids_of(tokenizer, "<s>"), ids_of(tokenizer, "a", "</s>"))


def test_special_tokens_that_are_blanks_take_no_time():
    tokenizer = toy_tokenizer(chat_template=CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["\n", "\n\n", " "]})
    assert encode_pair(text("q", "\n" * 60 + "x", "b"), tokenizer).dropped == ""


# Templates that surprise

REWRITES = (  # earlier turns look otherwise once there is an answer
    "{% for m in messages %}{{ '!' if messages[-1].role == 'assistant' }}{{ m.role }}: "
    "{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_template_that_rewrites_the_prompt_drops_the_row():
    """Else earlier turns would be trained on as if they were the response."""
    found = encode_pair(chat("q", "a", "b"), toy_tokenizer(chat_template=REWRITES))
    assert (found.dropped, found.mistake) == ("template_rewrites_prompt", "")


@pytest.mark.parametrize(
    ("template", "answer", "surprises"),
    [
        (CHATML, "fine", {}),
        (CHATML, "a</s>b", {"control_text": "</s>"}),
        (CHATML.partition("{% if add")[0], "a", {"template_text": "<|start|>assistant\n"}),
        (CHATML.replace("m['content']", "m['content'][1:]"), "xa", {"rewritten": "xa"}),
    ],
)
def test_what_a_template_does_unasked_is_counted(tmp_path, template, answer, surprises):
    tokenizer = toy_tokenizer(chat_template=template)
    found = encode_pair(chat("q", answer, "another"), tokenizer)
    assert found.surprises == surprises
    rows = [CHAT | {"rejected_response": "bb"}, CHAT | {"chosen_response": answer}]
    data = prepare({"train_data_path": jsonl(tmp_path / "a.jsonl", rows)}, tokenizer=tokenizer)
    for kind, example in surprises.items():
        counted = data.report["train"]["surprises"][kind]
        assert counted["rows"] >= 1 and example in (counted["example"], answer)
        assert f"train: in {counted['rows']} rows" in format_report(data.report)


def test_text_that_the_tokenizer_does_not_know_is_counted():
    from tests.faults.template_pairs import word_piece

    assert encode_pair(text("q", "\u4e00", "b"), word_piece()).surprises.keys() == {"unknown_text"}
    assert encode_pair(text("q", "a", "b"), word_piece()).surprises == {}


# Files


def test_json_that_is_too_deep_or_too_long():
    assert parse_json("[" * DEPTH + "]" * DEPTH)
    for bad in ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), '{"a":' * 900 + "1" + "}" * 900):
        with pytest.raises(ValueError, match="nested more than 64 deep"):
            parse_json(bad)
    with pytest.raises(ValueError, match=r"the number 9{24}\.\.\. has over 64 bits"):
        parse_json("9" * 5000)


@pytest.mark.parametrize("name", ["pipe.jsonl", "zero.jsonl", "pipe.parquet"])
def test_pipes_and_devices_are_not_waited_for(tmp_path, name):
    path = tmp_path / name
    path.symlink_to("/dev/zero") if "zero" in name else os.mkfifo(path)
    with pytest.raises(ValueError, match="is no regular file"):
        FileDataset(str(path))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_that_changes_while_it_is_read_is_not_used(tmp_path, monkeypatch, suffix):
    """Its rows would be kept in the cache as those of the file that it was."""
    path = tmp_path / f"a.{suffix}"

    def write(answer: str) -> None:
        if suffix == "jsonl":
            jsonl(path, [text_row(0, chosen=answer)])
        else:
            pq.write_table(pa.Table.from_pylist([text_row(0, chosen=answer)]), path)

    write("first")
    name = "_json_features" if suffix == "jsonl" else "_parquet_features"
    real = getattr(files, name)
    monkeypatch.setattr(files, name, lambda paths: (real(paths), write("other"))[0])
    with pytest.raises(ValueError, match=f"a.{suffix}: a file changed while it was read"):
        FileDataset(str(path))
    monkeypatch.undo()
    write("first")
    assert FileDataset(str(path)).formatted_ds["train"][0]["chosen"] == "first"


def test_parquet_columns_twice_no_rows_and_flipped_bits(tmp_path):
    path = tmp_path / "a.parquet"
    one = pa.array(["some text"])
    pq.write_table(pa.Table.from_arrays([one, one], names=["chosen", "chosen"]), path)
    with pytest.raises(ValueError, match="'chosen' twice"):
        FileDataset(str(path))
    pq.write_table(pa.table({"chosen": one})[:0], path)
    with pytest.raises(ValueError, match=r"a\.parquet has no rows"):
        FileDataset(str(path))
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.table({"chosen": one}), path, write_page_checksum=True, **options)
    path.write_bytes(path.read_bytes().replace(b"some text", b"some tExt"))
    with pytest.raises(ValueError, match=r"a\.parquet.*CRC"):
        FileDataset(str(path))


def test_keys_that_arrow_would_cut_and_homes_that_are_not(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"chosen\0": "a"}) + "\n")
    with pytest.raises(ValueError, match="has a NUL character"):
        FileDataset(str(path))
    with pytest.raises(ValueError, match="there is no such file"):
        FileDataset("~nobody-of-this-name/a.jsonl")
